"""What runs in a worker's process before the script: tie its life to the supervisor's, then be `python SCRIPT`.

Contract: the supervisor starts this file by its path, as
`python worker.py SUPERVISOR_PID LIFELINE_FD script|module TARGET [ARGUMENT...]`, in a session of its own. It holds the
write end of the pipe LIFELINE_FD and never writes. (A worker that was forked from a `template` calls the two halves of
`main` itself.) Afterwards:
- the kernel kills this process when the supervisor's main thread ends, however it ends (PDEATHSIG), and everything in
  its process group when the last write end of the pipe closes (asynchronous I/O with SIGKILL as its signal). Neither
  needs a thread, so nothing in this process can hold it up, and forking stays free of a second thread. Where the
  kernel has no such means, a thread waits on the pipe instead.
- a notice that comes before the script handles it (SIGUSR1, with which schedulers announce a job's end) is noted by the
  handler that the script then finds, and does not end the process.
- `sys.argv`, `sys.path[0]`, `__main__` and tracebacks are what `python TARGET` or `python -m TARGET` would give, so
  that processes which the script spawns find its `__main__` too.
- a script that ends by an exception is ended once threads, exit handlers and output are done with, without the
  interpreter's taking itself apart.
- while torch is imported the garbage collector rests: the import makes hundreds of thousands of objects, nearly all of
  which stay, and looking through them again and again took a tenth of its time.
Standard library only, and nothing of allstep: the script decides what is imported.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # this file's folder; until the script runs, nothing but the library and site-packages is found

import atexit
import contextlib
import faulthandler
import fcntl
import gc
import io
import os
import pkgutil
import select
import signal
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import FrameType, ModuleType, TracebackType
from typing import NoReturn

# typeshed shows only the public part of runpy; this is what `python -m` itself calls, and what debuggers use.
from runpy import _run_module_as_main  # type: ignore[attr-defined]  # isort: skip

_PR_SET_PDEATHSIG = 1


def tie_to_supervisor(supervisor: int, lifeline: int) -> None:
    """Make sure that this process and its group do not outlive the supervisor; leave at once if they already have."""
    os.set_inheritable(lifeline, False)
    if not (_die_with_parent() and _kill_group_on_close(lifeline)):
        threading.Thread(target=_await_close, args=(lifeline,), daemon=True, name="allstep lifeline").start()
    if os.getppid() != supervisor or select.select([lifeline], [], [], 0)[0]:
        _kill_own_group()


def _die_with_parent() -> bool:
    if sys.platform != "linux":
        return False
    try:
        import ctypes

        return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def _kill_group_on_close(lifeline: int) -> bool:
    if sys.platform != "linux":
        return False
    try:
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        return False
    return True


def _await_close(lifeline: int) -> None:
    with contextlib.suppress(OSError):
        os.read(lifeline, 1)
    _kill_own_group()


def _kill_own_group() -> None:
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class _QuietImport:
    """On `sys.meta_path`: finds modules where they are anyway, and has the collector rest while they are executed."""

    def __init__(self, *names: str) -> None:
        self._names = set(names)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name not in self._names:
            return None
        self._names.discard(name)
        if not self._names:
            sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            _execute_quietly(spec.loader)
        return spec


def _execute_quietly(loader: SourceFileLoader) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del vars(loader)["exec_module"]
        collecting = gc.isenabled()
        gc.disable()
        try:
            execute(module)
        finally:
            if collecting:
                gc.enable()

    vars(loader)["exec_module"] = exec_module


class Notices:
    """What handles a notice before the script does: it is noted in `received`, and ends nothing."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal."""
        self.received.append(number)


def note_early_notices() -> None:
    """Note SIGUSR1 until the script has a handler of its own, and let it come: the supervisor blocked it till now."""
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, Notices())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def run_script(path: str, arguments: list[str]) -> None:
    """Run a file, or a folder or zip archive with a `__main__.py`, as `python PATH ARGUMENT...` does."""
    sys.argv = [path, *arguments]
    sys.orig_argv = [sys.executable, path, *arguments]
    if pkgutil.get_importer(os.path.abspath(path)) is not None:
        sys.path.insert(0, os.path.abspath(path))
        _new_main()
        _run_module_as_main("__main__", alter_argv=False)
        return
    if not sys.flags.safe_path:
        sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    absolute = os.path.abspath(path)
    with io.open_code(absolute) as file:
        code = compile(file.read(), absolute, "exec", dont_inherit=True)
    main = _new_main()
    main.__file__ = absolute
    main.__loader__ = SourceFileLoader("__main__", absolute)
    vars(main)["__cached__"] = None
    exec(code, main.__dict__)


def run_module(name: str, arguments: list[str]) -> None:
    """Run a module as `python -m NAME ARGUMENT...` does."""
    sys.argv = ["-m", *arguments]
    sys.orig_argv = [sys.executable, "-m", name, *arguments]
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    _new_main()
    _run_module_as_main(name)


def _new_main() -> ModuleType:
    main = ModuleType("__main__")
    vars(main)["__builtins__"] = sys.modules["builtins"]
    if sys.version_info < (3, 14):
        main.__annotations__ = {}
    sys.modules["__main__"] = main
    return main


def main(argv: list[str]) -> None:
    """Run what the supervisor's command line says."""
    supervisor, lifeline, kind, target, *arguments = argv
    tie_to_supervisor(int(supervisor), int(lifeline))
    run(kind, target, arguments)


def run(kind: str, target: str, arguments: list[str]) -> None:
    """Be the script, in a process that is tied to its supervisor; an exception leaves as it would without allstep."""
    note_early_notices()
    faulthandler.enable()
    sys.meta_path.insert(0, _QuietImport("torch", "torch._dynamo"))
    try:
        (run_module if kind == "module" else run_script)(target, arguments)
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = _without_this_file(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, Exception):
            _end_at_once(error)
        sys.excepthook = _say_nothing  # said already; what the interpreter does besides must still happen
        raise


def _end_at_once(error: Exception) -> NoReturn:
    """End with status 1, as the interpreter does after an exception, but do not take every module apart before.

    With torch that takes the better part of a second, in which the others wait for a process that has nothing to do;
    and a thread in C++ that comes back meanwhile aborts it, with another status.
    """
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    sys.last_exc = error  # type: ignore[attr-defined]  # where the interpreter leaves it, from Python 3.12 on, for those that look at the end
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are not daemons
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    os._exit(1)


def _without_this_file(traceback: TracebackType | None) -> TracebackType | None:
    """Leave out this file's frames, and those of the import system that lead to them."""
    kept: list[TracebackType] = []
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename != __file__:
            kept.append(traceback)
        else:
            while kept and kept[-1].tb_frame.f_code.co_filename.startswith("<frozen importlib"):
                kept.pop()
        traceback = traceback.tb_next
    following: TracebackType | None = None
    for each in reversed(kept):
        each.tb_next = following
        following = each
    return following


def _say_nothing(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    pass


if __name__ == "__main__":
    main(sys.argv[1:])
