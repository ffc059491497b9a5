"""The sidecar's own process: run by path as `python -I -S sidecar_process.py LIFELINE ANSWER [STDERR]`; see `sidecar`.

The arguments are file descriptors. Its setup comes as a line on the lifeline. Its port, or why it cannot serve, goes to
the answer. It serves until the lifeline has closed, no rank is connected any more and nothing is left to judge or to
tell, or until `_END_S` after a verdict. It ignores the signals that a scheduler sends to a whole job: it ends when the
ranks have.

It holds a `ProcessWitness` of each rank of its node. The moment that one's connection is gone it tells how the process
ends, or as soon as it has ended: a scheduler may end everything on the node a few milliseconds later. The rank that
started it is asked after when the lifeline closes, which is before that: its memory is still to be freed.

The head's sidecar keeps the run's record (`record`), from when it has answered.

STDERR is the standard error of the rank that started it. The report is written there, since a launcher may end all
ranks within a tenth of a second. Where there is none, a rank writes it.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # without site-packages: find the package that this file is in, behind the library
    import os.path

    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import contextlib
import json
import os
import selectors
import signal
import socket
import time
from pathlib import Path

from allstep.diagnosis.hang import HangLimits
from allstep.diagnosis.rank_outcome import OutcomeKind
from allstep.diagnosis.report import failure_json, failure_text, straggler_line
from allstep.diagnosis.root_cause import Diagnosis
from allstep.exit_codes import PEER_LOST
from allstep.monitor.hub import Hub
from allstep.monitor.memory import MemoryWatch
from allstep.monitor.process_witness import ProcessWitness
from allstep.monitor.relay import Relay
from allstep.monitor.report_output import write_bounded
from allstep.monitor.service import ConnectionLost, MonitorSettings, Service, StragglerSeen, Verdict
from allstep.monitor.sidecar import SidecarSetup
from allstep.monitor.sidecar_record import SidecarRecord, open_record
from allstep.protocol.address import listen, split_address
from allstep.protocol.connection import Connection
from allstep.protocol.descriptors import raise_descriptor_limit
from allstep.protocol.masking import mask, mask_all
from allstep.protocol.messages import CheckpointSaved, Finish, Leave
from allstep.protocol.private_files import write_private_json
from allstep.protocol.registration import RankRegistration
from allstep.protocol.worker_exit import WorkerExit

LEAVE_S = 1.0
"""Seconds that a rank has to leave on order, before it is killed."""

CLEAN_UP_S = 5.0
"""Seconds that a rank has to end that is on its way out with an exception of its own."""

ENDING_S = 2.0
"""Seconds that a process has to end once its rank's connection is gone, while that is all that is waited for."""

_LOOK_S = 0.001  # from one look at a process that is about to end to the next

_END_S = 10.0  # from a verdict to the sidecar's own end, whatever hangs


class SidecarLoop:
    """The loop of the sidecar's process."""

    def __init__(self, setup: SidecarSetup, lifeline: int, listener: socket.socket, stderr: int | None) -> None:
        self._setup = setup
        self._stderr = stderr
        self._selector = selectors.DefaultSelector()
        self._lifeline_open = True
        self._starter = os.getppid()
        self._lifeline = lifeline
        self._selector.register(lifeline, selectors.EVENT_READ, "lifeline")
        self._memory = MemoryWatch()
        self._processes: dict[int, ProcessWitness] = {}  # of each rank of this node
        self._record: SidecarRecord | None = None
        self._service = self._open_service(listener)
        self._looked_at: set[int] = set()  # those of them whose end is known to have begun
        self._ending: dict[int, float] = {}  # ranks whose process is about to end, and until when that is waited for
        self._kill: list[tuple[float, frozenset[int]]] = []
        self._end_at: float | None = None
        self._code = 0

    def _open_service(self, listener: socket.socket) -> Service:
        setup, limits = self._setup, HangLimits.parse(self._setup.limits)
        settings = MonitorSettings(
            setup.key,
            setup.attempt,
            setup.world_size,
            limits,
            supervised=False,
            introduced=self._hold,
            report=self._print,
            remark=self._memory.remark,
            saved=self._note_save,
        )
        if setup.upstream:
            head = split_address(setup.upstream)
            return Relay(
                self._selector, listener, settings, upstream=head, node_rank=setup.node_rank, ranks=setup.ranks
            )
        hub = Hub(self._selector, listener, settings)
        for node in range(1, setup.nodes):
            hub.expect_node(node)
        return hub

    def _note_save(self, saved: CheckpointSaved) -> None:
        if self._record is not None:
            self._record.saved(saved)

    def keep_record(self) -> None:
        """Keep the run's record from now on, where this is the head and a record is asked for."""
        if isinstance(self._service, Hub):
            self._record = open_record(self._setup, self._service, self._say)

    def _keep_up_record(self) -> None:
        if self._record is not None:
            self._record.look()
            if time.monotonic() >= self._record.deadline():
                self._record.tick()

    def run(self) -> None:
        """Serve until no rank needs it."""
        while not self.is_over():
            now = time.monotonic()
            times = [self._service.deadline(), self._end_at, *(at for at, _ in self._kill), *self._ending.values()]
            times.append(None if self._record is None else self._record.deadline())
            if self._looked_at:
                times.append(now + _LOOK_S)
            until = min(at for at in times if at is not None)
            ended = []
            for key, _ in self._selector.select(max(0.0, until - now)):
                if key.data == "lifeline":
                    self.read_lifeline()
                elif isinstance(key.data, int):  # a rank, whose process has ended
                    ended.append(key.data)
                else:
                    self._service.ready(key)
            for rank in list(self._looked_at):
                self._take_end(rank)
            for rank in ended:  # behind what the process itself said last
                self._leave_unwatched(self._processes[rank])
                self._take_end(rank)
            self._act()  # first, since how a process ended can be reason enough for a verdict
            if time.monotonic() >= self._service.deadline():
                self._service.tick()
                self._act()
            self._keep_up_record()
            self._kill_late()
        if self._record is not None:
            self._record.ended()
        self._service.finish("", self._code)
        self.close()

    def close(self) -> None:
        """Let go of all sockets."""
        with contextlib.suppress(OSError):  # whatever goes wrong now, the process ends
            self._service.close()
        for rank in list(self._processes):
            self._let_go(rank)
        self._selector.close()

    def is_over(self) -> bool:
        """Whether no rank needs it any more, or it has waited long enough after a verdict."""
        # While the rank that started it lives and nothing has failed, another World may be opened.
        if self._end_at is None and self._lifeline_open:
            return False
        if self._end_at is not None and time.monotonic() >= self._end_at:
            return True
        now = time.monotonic()
        self._ending = {rank: until for rank, until in self._ending.items() if until > now}
        service = self._service
        return not (self._kill or self._ending or service.undecided or service.connected or service.backlog)

    def read_lifeline(self) -> None:
        """Notice that the starter has released the sidecar, or is gone."""
        if not os.read(self._lifeline, 1):
            self._lifeline_open = False
            self._selector.unregister(self._lifeline)
            for rank in self._service.present():  # one that has closed its World only lets go
                if rank in self._processes and self._processes[rank].pid == self._starter:
                    self._expect_process_end(rank)

    def _expect_process_end(self, rank: int) -> None:
        self._looked_at.add(rank)
        self._ending[rank] = time.monotonic() + ENDING_S

    def _act(self) -> None:
        for event in self._service.take():
            match event:
                case ConnectionLost(rank) if rank in self._processes:
                    self._expect_process_end(rank)
                    self._take_end(rank)
                case Verdict(diagnosis):
                    self._conclude(diagnosis)
                case StragglerSeen(rank, ratio):
                    printer = min(self._service.present(), default=0)
                    self._service.notify(f"allstep: {straggler_line(rank, ratio)}\n", printer)
                case Leave(code=int(code), spared=spared):
                    self._expect_end(code, frozenset(spared))
                case Finish(_, code):
                    self._expect_end(code, frozenset())

    def _hold(self, registration: RankRegistration, connection: Connection) -> None:
        """Hold on to a rank's process, so that its end is known, and a later SIGKILL hits no other process.

        A rank says itself which process it is. It is believed where the kernel says that this process holds its
        connection. A second process that says it is the same rank is left to who admits ranks.
        """
        rank, held = registration.rank, self._processes.get(registration.rank)
        here = self._setup.node_rank, socket.gethostname()
        if (registration.node_rank, registration.host) != here or (held is not None and not held.has_ended):
            return
        witness = ProcessWitness.of_peer(registration.pid, connection.sock)
        if witness is not None:
            self._let_go(rank)
            self._processes[rank] = witness
            self._selector.register(witness, selectors.EVENT_READ, rank)

    def _let_go(self, rank: int) -> None:
        witness = self._processes.pop(rank, None)
        if witness is not None:
            self._leave_unwatched(witness)
            witness.close()

    def _leave_unwatched(self, witness: ProcessWitness) -> None:
        with contextlib.suppress(KeyError):  # it has ended, and that was seen
            self._selector.unregister(witness)

    def _take_end(self, rank: int) -> None:
        """Tell how a rank's process ended, if that is known."""
        witness = self._processes[rank]
        code = witness.returncode()
        if code is not None:
            self._service.foretell(WorkerExit(rank, code))
            self._service.worker_ended(WorkerExit(rank, code, note=self._memory.note(code, "")))
        if code is not None or witness.has_ended or time.monotonic() >= self._ending.get(rank, 0.0):
            self._ending.pop(rank, None)
            self._looked_at.discard(rank)

    def _conclude(self, diagnosis: Diagnosis) -> None:
        cause = diagnosis.cause
        # Ranks with an exception of their own are on their way out, and may save what they have done.
        own = frozenset(
            each.rank for each in (cause, *diagnosis.others) if each.kind in (OutcomeKind.ERROR, OutcomeKind.SEEN)
        )
        report = failure_text(diagnosis, name=self._setup.run)
        hung = {each.rank for each in (cause, *diagnosis.others) if each.kind is OutcomeKind.HANG}
        living = [rank for rank in self._service.present() if rank not in hung] or self._service.present()
        # A rank that hangs cannot print; the one that failed prints beside its own traceback where it can.
        printer = cause.rank if cause.rank in own and cause.rank in living else min(living, default=None)
        report = f"allstep: {mask(report, self._setup.secrets)}"
        if not self._service.writes_report:
            printer = None
        elif self._stderr is not None and write_bounded(self._stderr, report):
            printer, report = None, ""
        self._service.order_leave(
            f"rank {cause.rank}: {cause.what}",
            diagnosis.exit_code if hung else PEER_LOST,
            printer=printer,
            report=report,
        )
        self._write(diagnosis)
        if self._record is not None:
            self._record.failed(diagnosis)
        self._expect_end(diagnosis.exit_code, own)

    def _print(self, report: str) -> None:
        """Write a report that was left to this node."""
        if self._stderr is None or not write_bounded(self._stderr, report):
            self._service.notify(report, min(self._service.present(), default=-1))

    def _say(self, line: str) -> None:
        if self._stderr is not None:
            write_bounded(self._stderr, f"allstep: {mask(line, self._setup.secrets)}\n")

    def _write(self, diagnosis: Diagnosis) -> None:
        if self._setup.attempt_folder:
            content = mask_all(failure_json(diagnosis, name=self._setup.run), self._setup.secrets)
            name = f"failure_node_{self._setup.node_rank}.json" if self._setup.upstream else "failure.json"
            with contextlib.suppress(OSError):  # the report is printed all the same
                write_private_json(Path(self._setup.attempt_folder) / name, content)

    def _expect_end(self, code: int, own: frozenset[int]) -> None:
        now = time.monotonic()
        if self._end_at is None:
            self._code = code
            self._end_at = now + _END_S
            self._kill = [(now + LEAVE_S, frozenset(self._processes) - own), (now + CLEAN_UP_S, own)]

    def _kill_late(self) -> None:
        now = time.monotonic()
        for at, ranks in list(self._kill):
            left = [rank for rank in ranks if rank in self._processes and not self._processes[rank].has_ended]
            if not left:
                self._kill.remove((at, ranks))
            elif now >= at:
                self._kill.remove((at, ranks))
                for rank in left:
                    self._processes[rank].kill()


def main(lifeline: int, answer: int, stderr: int | None = None) -> None:
    """Serve until no rank needs it; the setup comes as a line on the lifeline, the port goes to `answer`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    raise_descriptor_limit()
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(lifeline, 1)
        if not byte:
            return
        line += byte
    values = json.loads(line)
    setup = SidecarSetup(**{**values, "ranks": tuple(values["ranks"]), "secrets": tuple(values["secrets"])})
    try:
        listener = listen(setup.host)
        loop = SidecarLoop(setup, lifeline, listener, stderr)
    except Exception as error:
        os.write(answer, f"{type(error).__name__}: {error}".encode())
        return
    os.write(answer, f"port {listener.getsockname()[1]}\n".encode())
    os.close(answer)
    loop.keep_record()
    loop.run()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
