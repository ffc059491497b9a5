"""The warm server that ranks are forked from: a process that has imported torch and does nothing else.

Contract: `own_server()` gives this process's server. `fork` makes one new process for one rank's call, at the cost of a
fork instead of an import of torch. The server ends when this process ends, however that happens, because the socket
between the two then closes. A rank ends with its server (PDEATHSIG) and when its lifeline closes. So does all that the
rank started.

The conversation: the caller sends a request (modules to import, the pickled call) with the descriptors that the rank
needs. The server imports what is missing, forks, and answers with the pid. It reaps each rank and writes the exit code
to that rank's status pipe. The result of a call does not pass through the server: the rank writes it to its own pipe.

Only a process with one thread is forked, since locks that another thread holds would stay locked for ever in the fork.
The server counts its threads after its imports. What can go wrong: an import starts a thread, or the server dies; both
are a `RanksError`.

multiprocessing's forkserver does the like, but runs the caller's `__main__` in every process (under pytest that imports
pytest anew each time), and there is one a process, which the caller's own use of multiprocessing may have started.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple

from allstep.errors import RanksError

_FOR_ALL = (
    "torch",
    "torch._dynamo",  # torch imports it with the first optimizer or DDP model, and it takes as long as the rest
    "torch.distributed",
    "torch.nn.parallel",
    "allstep.checkpoint",
    "allstep.engine",
    "allstep.testing.rank_process",
    "allstep.world",
    "encodings.idna",  # which the first look-up of a host's name imports
)
_WHERE_USED = ("hypothesis", "pytest", "torchdata", "torchmetrics")
"""Imported once the caller has: each takes a tenth of a second to a second, which not every call needs."""

_PROGRAM = "import sys, json; sys.path[:] = json.loads(sys.argv[2]); from {0} import serve; serve(int(sys.argv[1]))"
_LENGTH = struct.Struct("!Q")
_STATUS = struct.Struct("!i")
_MOST_DESCRIPTORS = 8
_END_S = 10.0
_STACKS_S = 1.0
_MOST_STACKS = 20_000


class ForkedRank:
    """A process that the server has forked for one rank's call, as the caller holds it.

    `outcome` becomes readable when the call is over, and `status` when the process has ended.
    """

    def __init__(self, server: ForkServer, call: bytes, store: int) -> None:
        self.outcome, outcome = Pipe(duplex=False)
        self.status, status = Pipe(duplex=False)
        lifeline, self._lifeline = os.pipe()
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        try:
            ends = status.fileno(), outcome.fileno(), lifeline, self._stacks.fileno(), store
            self.pid = server.fork(call, ends)
        except BaseException:
            self._close()
            raise
        finally:
            outcome.close()
            status.close()
            os.close(lifeline)

    def exit_code(self, timeout: float = _END_S) -> int | None:
        """Wait for the process to end and return how it did, -N for signal N; None where that does not become known."""
        if not self.status.poll(timeout):
            return None
        try:
            code: int = _STATUS.unpack(os.read(self.status.fileno(), _STATUS.size))[0]
        except struct.error:  # the server was killed, and the rank with it
            return None
        return code

    def stacks(self, *, ask: bool) -> str:
        """What it wrote into its file for stacks: after a crash, or, if asked for, where its threads stand now."""
        before = os.fstat(self._stacks.fileno()).st_size
        if ask:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGQUIT)
            deadline = time.monotonic() + _STACKS_S
            while os.fstat(self._stacks.fileno()).st_size == before and time.monotonic() < deadline:
                time.sleep(0.01)  # faulthandler tells nobody when it has written
        written = os.pread(self._stacks.fileno(), _MOST_STACKS, before if ask else 0)
        return written.decode(errors="replace").strip()

    def kill(self) -> None:
        """Kill it and what it started, by letting go of the lifeline: that needs no pid, which could be another's."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def end(self) -> None:
        """Kill it, wait until it is gone, and close what belongs to it."""
        self.kill()
        self.status.poll(_END_S)
        self._close()

    def _close(self) -> None:
        self.kill()
        self.outcome.close()
        self.status.close()
        self._stacks.close()


class ForkServer:
    """The caller's end of the server. Threads may call it at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, *_interpreter_options(), "-c", _PROGRAM.format(__name__)]
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                # One thread a rank: ranks share the machine's cores, and started OpenMP threads cannot be forked.
                # Nor can a started CUDA driver; with the second variable torch asks for devices without starting it.
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the caller, which then ends its ranks
            )

    def is_alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process.poll() is None

    def fork(self, call: bytes, descriptors: tuple[int, ...]) -> int:
        """Have a rank forked and return its pid.

        Args:
            call: the pickled call.
            descriptors: status, outcome, lifeline, stacks and store, which stay the caller's to close.

        Raises:
            RanksError: the server cannot fork, or has died.
        """
        wanted = [name for name in sys.modules if name in _WHERE_USED or name.partition(".")[0] == "allstep"]
        with self._lock:
            try:
                _send(self._socket, pickle.dumps((wanted, call)), (*descriptors, *_streams()))
                answer, _ = _receive(self._socket)
            except (ConnectionError, EOFError):
                code = self._process.wait()
                raise RanksError(
                    f"the server that ranks are forked from ended with exit code {code}; what it wrote to standard "
                    "error says why"
                ) from None
        pid_or_problem: int | str = pickle.loads(answer)
        if isinstance(pid_or_problem, str):
            raise RanksError(pid_or_problem)
        return pid_or_problem

    def close(self) -> None:
        """End it, and with it the ranks that are left."""
        self._socket.close()
        self._process.wait()

    def leave_to_parent(self) -> None:
        """Forget it, in a fork of the process that it belongs to."""
        self._socket.close()
        self._process.returncode = 0  # else Popen warns of a process that this one cannot wait for


_servers: dict[int, ForkServer] = {}  # by the pid of whose it is: a fork inherits what it must not use
_starting = threading.Lock()


def own_server() -> ForkServer:
    """The server of this process, started when first asked for."""
    with _starting:
        server = _servers.get(os.getpid())
        if server is None or not server.is_alive():
            for others in [pid for pid in _servers if pid != os.getpid()]:
                _servers.pop(others).leave_to_parent()
            server = _servers[os.getpid()] = ForkServer()
    return server


@atexit.register
def close_server() -> None:
    """End this process's server; the next call starts another."""
    server = _servers.pop(os.getpid(), None)
    if server is not None:
        server.close()


def _interpreter_options() -> list[str]:
    """What the caller's interpreter was told that functions of a test can notice."""
    return ["-O"] * sys.flags.optimize + [f"-W{option}" for option in sys.warnoptions]


def _streams() -> Iterable[int]:
    """The caller's standard streams at this moment, since a test may have put others in place of the process's."""
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            os.fstat(fd)
            yield fd


# What follows runs in the server.


class RankDescriptors(NamedTuple):
    """The descriptors that come with a request, in this order."""

    status: int
    outcome: int
    lifeline: int
    stacks: int
    store: int
    stdout: int = -1
    stderr: int = -1


def serve(descriptor: int) -> None:
    """Fork ranks until the caller closes its end of the socket.

    Args:
        descriptor: of the server's end.
    """
    imported: set[str] = set()
    problem = _import(_FOR_ALL, imported)
    alive: dict[int, int] = {}  # the status pipe of each rank
    wakeup, noted = os.pipe()
    os.set_blocking(noted, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # with a handler in place Python writes to `noted`
    signal.set_wakeup_fd(noted, warn_on_full_buffer=False)
    caller = socket.socket(fileno=descriptor)
    waiting = select.poll()  # `select` takes no descriptor above 1023
    for fd in (descriptor, wakeup):
        waiting.register(fd, select.POLLIN)
    while True:
        ready = [fd for fd, _ in waiting.poll()]
        if wakeup in ready:
            os.read(wakeup, 4096)
            _reap(alive)
        if descriptor not in ready:
            continue
        try:
            request, descriptors = _receive(caller)
        except (EOFError, ConnectionError):
            os._exit(0)  # torch need not be taken apart
        ends = RankDescriptors(*descriptors)
        wanted, call = pickle.loads(request)
        problem = problem or _import(wanted, imported)
        pid_or_problem: int | str = problem
        if not problem:
            pid_or_problem = _fork(call, ends, own=[descriptor, wakeup, noted, *alive.values()])
        if isinstance(pid_or_problem, int):
            alive[pid_or_problem] = ends.status
        for fd in ends:
            if fd >= 0 and not (fd == ends.status and isinstance(pid_or_problem, int)):
                os.close(fd)
        with contextlib.suppress(ConnectionError):
            _send(caller, pickle.dumps(pid_or_problem))


def _import(names: Iterable[str], imported: set[str]) -> str:
    """Import what is missing, and return why the process cannot be forked after that, or ""."""
    new = [name for name in names if name not in imported]
    if not new:
        return ""
    for name in new:
        imported.add(name)
        with contextlib.suppress(Exception):  # the rank that needs it says what is wrong
            import_module(name)
    threads = _threads_that_stay()
    if threads > 1:
        return (
            f"importing {', '.join(new)} has started {threads - 1} threads, and ranks forked from a process with "
            "threads could hang; have what starts them (a sitecustomize, say) do so later"
        )
    gc.collect()
    gc.freeze()  # a rank's collector then neither reads nor copies what it shares with the server
    return ""


def _threads_that_stay() -> int:
    """How many threads this process has, also those that Python knows nothing of."""
    if thread_count() > 1:
        # OpenBLAS puts its threads away before a fork, so a fork shows which threads are only of that kind.
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    return thread_count()


def thread_count() -> int:
    """How many threads this process has now."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:  # no /proc, as on macOS
        return threading.active_count()


def _fork(call: bytes, ends: RankDescriptors, own: list[int]) -> int | str:
    server = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        return f"a rank could not be forked: {error}"
    if pid:
        return pid
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in (*own, ends.status):  # a status pipe that a rank held open would not tell of another's end
            os.close(fd)
        for fd, standard in ((ends.stdout, 1), (ends.stderr, 2)):
            if fd >= 0:
                os.dup2(fd, standard)
                os.close(fd)
        from allstep.testing.rank_process import run_call

        run_call(call, server, Connection(ends.outcome, readable=False), ends.lifeline, ends.stacks, ends.store)
    finally:
        os._exit(1)  # whatever happens, a rank must not go on as a second server


def _reap(alive: dict[int, int]) -> None:
    """Tell the caller of each rank that has ended how it did."""
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        fd = alive.pop(pid)
        with contextlib.suppress(BrokenPipeError):  # the caller did not wait for it
            os.write(fd, _STATUS.pack(os.waitstatus_to_exitcode(status)))
        os.close(fd)


def _send(to: socket.socket, message: bytes, descriptors: Iterable[int] = ()) -> None:
    socket.send_fds(to, [_LENGTH.pack(len(message))], list(descriptors))
    to.sendall(message)


def _receive(source: socket.socket) -> tuple[bytes, list[int]]:
    head, descriptors, _, _ = socket.recv_fds(source, _LENGTH.size, _MOST_DESCRIPTORS)
    if len(head) < _LENGTH.size:
        raise EOFError
    message = bytearray()
    left = _LENGTH.unpack(head)[0]
    while len(message) < left:
        part = source.recv(left - len(message))
        if not part:
            raise EOFError
        message += part
    return bytes(message), descriptors
