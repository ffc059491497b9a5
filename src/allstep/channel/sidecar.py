"""The service of ranks that no supervisor started: a small process of its own, so that a frozen rank cannot silence it.

Contract: `start_sidecar` is called by one rank of each node. It starts this file by its path in a session of its own,
with nothing on its standard streams, and returns when the service listens. The caller holds the write end of the
sidecar's lifeline, through which it also gives the configuration, so that the nonce is on no command line. The sidecar
ends when its lifeline has closed, no rank is connected any more, and nothing is left to judge.

After a verdict it orders the ranks to leave, has the cause itself, or else the lowest living rank, print the report,
writes `failure.json` where an attempt folder is known, and kills what stays of its node. It ignores the signals that a
scheduler sends to a whole job: it ends when the ranks have.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # started by path, without site-packages: find the package that this file is in
    import os.path

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import contextlib
import json
import os
import secrets
import select
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from allstep.channel.address import join_address, split_address
from allstep.channel.causes import Case
from allstep.channel.events import AllArrived, Finished, Ordered, StragglerSeen, Verdict
from allstep.channel.hub import Hub
from allstep.channel.limits import Limits
from allstep.channel.record import Kind
from allstep.channel.relay import Relay
from allstep.channel.report import failure_json, failure_text, write_report
from allstep.errors import WorldError

LEAVE_S = 1.0
"""Seconds that a rank has to leave on order, before it is killed."""

CLEAN_UP_S = 5.0
"""Seconds that a rank has to end that is on its way out with an exception of its own."""

_END_S = 10.0  # from a verdict to the sidecar's own end, whatever hangs
_BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Setup:
    """What a sidecar is told."""

    nonce: str
    attempt: int
    world_size: int
    host: str
    limits: str
    attempt_folder: str
    upstream: str
    node_rank: int
    ranks: tuple[int, ...]
    run: str


class Sidecar:
    """A started sidecar: the address that its ranks connect to, and its process."""

    def __init__(self, address: str, process: subprocess.Popen[bytes], lifeline: int) -> None:
        self.address = address
        self.pid = process.pid
        self._process = process
        self._lifeline = [lifeline]
        kept = self._lifeline
        os.register_at_fork(after_in_child=lambda: _close_all(kept))

    def release(self) -> None:
        """Let it end, as soon as no rank needs it any more."""
        _close_all(self._lifeline)


def start_sidecar(
    *,
    nonce: str = "",
    attempt: int,
    world_size: int,
    host: str = "127.0.0.1",
    limits: str = "",
    attempt_folder: str = "",
    upstream: str = "",
    node_rank: int = 0,
    ranks: Sequence[int] = (),
    run: str = "",
    timeout: float = 10.0,
) -> Sidecar:
    """Start a sidecar on this node.

    Args:
        nonce: the secret that its ranks, and relays, have to know.
        attempt: the present start's number.
        world_size: how many ranks the whole world has.
        host: the address to listen on: 127.0.0.1, or the one that other nodes reach this one by.
        limits: as in ALLSTEP_LIMITS.
        attempt_folder: where failure.json goes; empty: nowhere.
        upstream: HOST:PORT of the head's service, which makes this one a relay; empty: this is the head.
        node_rank: of this node.
        ranks: of this node, for a relay.
        run: the run's name, for the report.
        timeout: seconds that it has to start.

    Raises:
        ConfigurationError: the limits are not as they must be.
        WorldError: it did not start.
    """
    Limits.parse(limits)
    setup = Setup(nonce, attempt, world_size, host, limits, attempt_folder, upstream, node_rank, tuple(ranks), run)
    theirs, lifeline = os.pipe()
    answer, answer_theirs = os.pipe()
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, lifeline)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", os.path.abspath(__file__), str(theirs), str(answer_theirs)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs, answer_theirs),
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            os.close(answer)
            raise WorldError(f"the service of this node's ranks could not be started: {error}") from error
        finally:
            os.close(theirs)
            os.close(answer_theirs)
        os.write(lifeline, json.dumps(asdict(setup)).encode() + b"\n")
        text = _read_answer(answer, timeout)
        port = text.removeprefix("port ")
        if not text.startswith("port "):
            process.kill()
            process.wait()
            raise WorldError(
                f"the service of this node's ranks did not start within {timeout:g} s: {text or 'no word'}"
            )
        undo.pop_all()
    return Sidecar(join_address(host, int(port)), process, lifeline)


def new_nonce() -> str:
    """A secret for one start of one run."""
    return secrets.token_hex(16)


def _read_answer(fd: int, timeout: float) -> str:
    deadline, data = time.monotonic() + timeout, b""
    try:
        while (left := deadline - time.monotonic()) > 0 and select.select([fd], [], [], left)[0]:
            chunk = os.read(fd, 4096)
            data += chunk
            if not chunk:
                break
    finally:
        os.close(fd)
    return data.decode(errors="replace").strip()


def _close_all(fds: list[int]) -> None:
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())


class _Service:
    """The loop of the sidecar's process."""

    def __init__(self, setup: Setup, lifeline: int, listener: socket.socket) -> None:
        self._setup = setup
        self._selector = selectors.DefaultSelector()
        self._lifeline_open = True
        self._lifeline = lifeline
        self._selector.register(lifeline, selectors.EVENT_READ, "lifeline")
        limits = Limits.parse(setup.limits)
        self._service: Hub | Relay = (
            Relay(
                self._selector,
                listener,
                split_address(setup.upstream),
                nonce=setup.nonce,
                attempt=setup.attempt,
                node_rank=setup.node_rank,
                ranks=setup.ranks,
                world_size=setup.world_size,
                limits=limits,
                supervised=False,
            )
            if setup.upstream
            else Hub(
                self._selector,
                listener,
                nonce=setup.nonce,
                attempt=setup.attempt,
                world_size=setup.world_size,
                limits=limits,
                supervised=False,
            )
        )
        self._processes: dict[int, int] = {}  # pidfd of each rank of this node
        self._kill: list[tuple[float, frozenset[int]]] = []
        self._end_at: float | None = None
        self._code = 0

    def run(self) -> None:
        while not self._over():
            now = time.monotonic()
            times = [self._service.deadline(), self._end_at, *(at for at, _ in self._kill)]
            until = min(at for at in times if at is not None)
            for key, _ in self._selector.select(max(0.0, until - now)):
                if key.data == "lifeline":
                    self._read_lifeline()
                else:
                    self._service.ready(key)
            if time.monotonic() >= (self._service.deadline() or 0.0):
                self._service.tick()
            self._act()
            self._kill_who_stays()
        self._service.finish("", self._code)
        with contextlib.suppress(OSError):
            self._service.close()

    def _over(self) -> bool:
        if self._end_at is not None and (time.monotonic() >= self._end_at):
            return True
        idle = not self._service.connected and not self._service.backlog and not self._service.settling
        return idle and (self._end_at is not None or not self._lifeline_open) and not self._kill

    def _read_lifeline(self) -> None:
        if not os.read(self._lifeline, 1):
            self._lifeline_open = False
            self._selector.unregister(self._lifeline)

    def _act(self) -> None:
        for event in self._service.take():
            match event:
                case AllArrived():
                    self._hold_processes()
                case Verdict(case):
                    self._conclude(case)
                case StragglerSeen(rank, ratio):
                    text = f"allstep: rank {rank} is slow: {ratio:.1f} times the others' own time for a step\n"
                    self._service.notify(text, min(self._service.present(), default=0))
                case Ordered(_, code, spared):
                    self._expect_end(code, frozenset(spared))
                case Finished(_, code):
                    self._expect_end(code, frozenset())

    def _hold_processes(self) -> None:
        """Hold on to each rank's process of this node, so that a later KILL can meet nobody else."""
        here = socket.gethostname()
        for fd in self._processes.values():
            os.close(fd)
        self._processes.clear()
        for rank, (host, pid) in self._service.processes().items():
            if host == here:
                with contextlib.suppress(OSError, AttributeError):
                    self._processes[rank] = os.pidfd_open(pid)

    def _conclude(self, case: Case) -> None:
        cause = case.cause
        own = frozenset(each.rank for each in (cause, *case.others) if each.kind is Kind.ERROR)
        report = failure_text(case, name=self._setup.run)
        hung = {each.rank for each in (cause, *case.others) if each.kind is Kind.HANG}
        living = [rank for rank in self._service.present() if rank not in hung] or self._service.present()
        printer = cause.rank if cause.rank in own and cause.rank in living else min(living, default=None)
        self._service.order_leave(
            f"rank {cause.rank}: {cause.what}",
            case.exit_code if hung else 84,
            printer=printer,
            report=f"allstep: {report}",
        )
        self._write(case)
        self._expect_end(case.exit_code, own)

    def _write(self, case: Case) -> None:
        if self._setup.attempt_folder:
            name = f"failure_node_{self._setup.node_rank}.json" if self._setup.upstream else "failure.json"
            with contextlib.suppress(OSError):  # the report is printed all the same
                write_report(Path(self._setup.attempt_folder) / name, failure_json(case, name=self._setup.run))

    def _expect_end(self, code: int, own: frozenset[int]) -> None:
        now = time.monotonic()
        if self._end_at is None:
            self._code = code
            self._end_at = now + _END_S
            self._kill = [(now + LEAVE_S, frozenset(self._processes) - own), (now + CLEAN_UP_S, own)]

    def _kill_who_stays(self) -> None:
        now = time.monotonic()
        for at, ranks in list(self._kill):
            left = [rank for rank in ranks if rank in self._processes and not _ended(self._processes[rank])]
            if not left:
                self._kill.remove((at, ranks))
            elif now >= at:
                self._kill.remove((at, ranks))
                for rank in left:
                    with contextlib.suppress(OSError):
                        signal.pidfd_send_signal(self._processes[rank], signal.SIGKILL)


def _ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


def main(lifeline: int, answer: int) -> None:
    """Serve until nobody needs it; the setup comes as a line on the lifeline, the port goes to `answer`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(lifeline, 1)
        if not byte:
            return
        line += byte
    values = json.loads(line)
    setup = Setup(**{**values, "ranks": tuple(values["ranks"])})
    try:
        family = socket.AF_INET6 if ":" in setup.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((setup.host, 0))
        listener.listen(_BACKLOG)
        service = _Service(setup, lifeline, listener)
    except Exception as error:
        os.write(answer, f"{type(error).__name__}: {error}".encode())
        return
    os.write(answer, f"port {listener.getsockname()[1]}\n".encode())
    os.close(answer)
    service.run()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
