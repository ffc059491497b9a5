"""What runs in a worker's process before the script: tie its life to the supervisor's, then be `python SCRIPT`.

Contract: the supervisor starts this file by its path, as
`python worker.py SUPERVISOR_PID LIFELINE_FD script|module TARGET [ARGUMENT...]`, in a session of its own. LIFELINE_FD
is the read end of a pipe, the lifeline: the supervisor holds the write end and never writes, so the pipe ends with it.
(A worker that was forked from a `template` calls the two halves of `main` itself.) Afterwards:
- the kernel kills this process when the supervisor's main thread ends, however it ends (PDEATHSIG), and everything in
  its process group when the last write end of the pipe closes (asynchronous I/O with SIGKILL as its signal). Neither
  needs a thread, so nothing in this process can hold it up, and forking stays free of a second thread. Where the
  kernel has no such means, a thread waits on the pipe instead.
- SIGUSR1, with which schedulers announce a job's end, does not end the process where it comes before the script
  handles it. It is noted by the handler that the script then finds.
- `sys.argv`, `sys.path[0]`, `__main__` and tracebacks are what `python TARGET` or `python -m TARGET` would give, so
  that processes which the script spawns find its `__main__` too.
- a script that ends by an exception is ended once threads, exit handlers and what it left in open files are done with;
  modules are not taken apart one by one.
- where this process is to serve the ranks' store, torch's own rendezvous (`init_process_group`) serves it on the socket
  that the supervisor reserved, and ALLSTEP_STORE_FD becomes `PID:FD`, so that `allstep.init` does the same.
- while torch is imported the garbage collector is off: the import makes hundreds of thousands of objects, nearly all of
  which stay, and looking through them again and again took a tenth of its time.
Standard library only, and nothing of allstep but `interpreter.py`, `open_files.py` and `store_socket.py`: the script
decides what is imported.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # this file's folder; until the script runs, nothing but the library and site-packages is found

import contextlib
import faulthandler
import fcntl
import gc
import io
import marshal
import os
import pkgutil
import select
import signal
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader, SourcelessFileLoader
from importlib.util import MAGIC_NUMBER
from types import CodeType, FrameType, ModuleType, TracebackType
from typing import TYPE_CHECKING

_INTERPRETER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "interpreter.py")
_OPEN_FILES, _STORE_SOCKET = (
    os.path.join(os.path.dirname(os.path.dirname(_INTERPRETER)), name) for name in ("open_files.py", "store_socket.py")
)

if TYPE_CHECKING:
    from allstep import open_files, store_socket
    from allstep.launch import interpreter
else:
    # By their paths, since allstep's own __init__ is not to run, and under no names that a script could meet.
    interpreter, open_files = ModuleType("_allstep_interpreter"), ModuleType("_allstep_open_files")
    store_socket = ModuleType("_allstep_store_socket")
    SourceFileLoader(interpreter.__name__, _INTERPRETER).exec_module(interpreter)
    SourceFileLoader(open_files.__name__, _OPEN_FILES).exec_module(open_files)
    SourceFileLoader(store_socket.__name__, _STORE_SOCKET).exec_module(store_socket)

_RENDEZVOUS = "torch.distributed.rendezvous"
_PYC_HEADER = 16  # bytes before the code, since Python 3.7
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def main(argv: list[str]) -> None:
    """Run what the supervisor's command line says."""
    supervisor, lifeline, kind, target, *arguments = argv
    tie_to_supervisor(int(supervisor), int(lifeline))
    run(kind, target, arguments)


def run(kind: str, target: str, arguments: list[str]) -> None:
    """Be the script, in a process that is tied to its supervisor; an exception leaves as it would without allstep."""
    note_early_signals()
    faulthandler.enable()
    sys.meta_path.insert(0, _AroundImport({"torch": _quietly, "torch._dynamo": _quietly}))
    if "ALLSTEP_STORE_FD" in os.environ:
        serve_store_on(int(os.environ["ALLSTEP_STORE_FD"]))
    try:
        (run_module if kind == "module" else run_script)(target, arguments)
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = _without_own_frames(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, Exception):
            _end_at_once(error)
        sys.excepthook = _print_nothing  # it is printed already; what the interpreter does besides must still happen
        raise


def tie_to_supervisor(supervisor: int, lifeline: int) -> None:
    """Make sure that this process and its group do not outlive the supervisor; leave at once if they already have."""
    os.set_inheritable(lifeline, False)
    if not (_die_with_parent() and _kill_group_on_close(lifeline)):
        threading.Thread(target=_await_close, args=(lifeline,), daemon=True, name="allstep lifeline").start()
    if os.getppid() != supervisor or _has_ended(lifeline):  # it ended before it could be tied to
        _kill_own_group()


def _die_with_parent() -> bool:
    """Have the kernel kill this process when its parent's thread ends; return whether it will."""
    if sys.platform != "linux":
        return False
    try:
        import ctypes

        return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def _kill_group_on_close(lifeline: int) -> bool:
    """Have the kernel kill this process group when the pipe ends, by asynchronous I/O; return whether it will."""
    if sys.platform != "linux":
        return False
    try:
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        return False
    return True


def _has_ended(lifeline: int) -> bool:
    ready = select.poll()
    ready.register(lifeline, select.POLLIN)
    return bool(ready.poll(0))


def _await_close(lifeline: int) -> None:
    with contextlib.suppress(OSError):
        os.read(lifeline, 1)
    _kill_own_group()


def _kill_own_group() -> None:
    # Only a group of this process's own: in another's are processes that are none of allstep's.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class EarlySignals:
    """Handles a signal before the script does: it is noted in `received`, where `StopOnSignal` looks for it."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal."""
        self.received.append(number)


def note_early_signals() -> None:
    """Note SIGUSR1 until the script has a handler of its own, and let it come: the supervisor blocked it till now."""
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, EarlySignals())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def serve_store_on(descriptor: int) -> None:
    """Have torch's own rendezvous serve the ranks' store on this socket, as soon as that is imported."""
    os.set_inheritable(descriptor, False)
    # With the pid: the variable goes on to processes that the script starts, which do not have the socket.
    os.environ["ALLSTEP_STORE_FD"] = f"{os.getpid()}:{descriptor}"
    if _RENDEZVOUS in sys.modules:
        store_socket.use_for_rendezvous(sys.modules[_RENDEZVOUS])
    else:
        sys.meta_path.insert(0, _AroundImport({_RENDEZVOUS: _with_store_socket}))


class _AroundImport:
    """On `sys.meta_path`: finds modules where they are anyway, and has a function execute each.

    Args:
        around: by module, a function that is called with the module and with what executes it.
    """

    def __init__(self, around: dict[str, Callable[[ModuleType, Callable[[ModuleType], None]], None]]) -> None:
        self._around = around

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        around = self._around.pop(name, None)
        if around is None:
            return None
        if not self._around:
            sys.meta_path.remove(self)  # nothing is left to do, and every later import would come by here
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            _execute_by(spec.loader, around)
        return spec


def _execute_by(loader: SourceFileLoader, around: Callable[[ModuleType, Callable[[ModuleType], None]], None]) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del vars(loader)["exec_module"]  # the script finds the loader as the interpreter would have left it
        around(module, execute)

    vars(loader)["exec_module"] = exec_module


def _quietly(module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
    collecting = gc.isenabled()
    gc.disable()
    try:
        execute(module)
    finally:
        if collecting:
            gc.enable()


def _with_store_socket(module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
    execute(module)
    store_socket.use_for_rendezvous(module)


def run_script(path: str, arguments: list[str]) -> None:
    """Run a file, compiled or not, or a folder or zip archive with a `__main__.py`, as `python PATH` does."""
    sys.argv = [path, *arguments]
    sys.orig_argv = [sys.executable, path, *arguments]
    # Not os.path.abspath: for `link/../train.py` it names another file than the kernel opens.
    absolute = os.path.join(os.getcwd(), path)
    if pkgutil.get_importer(absolute) is not None:
        sys.path.insert(0, absolute)
        _new_main()
        interpreter.run_folder_as_main(path)
        return
    if not sys.flags.safe_path:
        sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    with io.open_code(absolute) as file:
        content = file.read()
    is_compiled = absolute.endswith(".pyc") or content.startswith(MAGIC_NUMBER)
    code = _compiled(content) if is_compiled else compile(content, absolute, "exec", dont_inherit=True)
    main = _new_main()
    main.__file__ = absolute
    main.__loader__ = (SourcelessFileLoader if is_compiled else SourceFileLoader)("__main__", absolute)
    vars(main)["__cached__"] = None  # as the interpreter has it for a script
    exec(code, main.__dict__)


def _compiled(content: bytes) -> CodeType:
    """The code in a compiled file."""
    if not content.startswith(MAGIC_NUMBER):
        raise RuntimeError("Bad magic number in .pyc file")
    code = marshal.loads(content[_PYC_HEADER:])
    if not isinstance(code, CodeType):
        raise RuntimeError("Bad code object in .pyc file")
    return code


def run_module(name: str, arguments: list[str]) -> None:
    """Run a module as `python -m NAME ARGUMENT...` does."""
    sys.argv = ["-m", *arguments]
    sys.orig_argv = [sys.executable, "-m", name, *arguments]
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    _new_main()
    interpreter.run_module_as_main(name)


def _new_main() -> ModuleType:
    main = ModuleType("__main__")
    vars(main)["__builtins__"] = sys.modules["builtins"]
    if sys.version_info < (3, 14):
        main.__annotations__ = {}
    sys.modules["__main__"] = main
    return main


def _end_at_once(error: Exception) -> None:
    """End with status 1, as the interpreter does after an exception, but do not take every module apart before.

    With torch that takes the better part of a second, in which the others wait for a process that has nothing to do;
    and a thread in C++ that comes back meanwhile aborts it, with another status. Returns where that is not possible.
    """
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    sys.last_exc = error  # type: ignore[attr-defined]  # where the interpreter leaves it, from Python 3.12 on, for those that look at the end
    if not interpreter.finish_threads_and_handlers():
        return
    open_files.write_buffers(close=True)
    for stream in (sys.stdout, sys.stderr):  # whatever a script has put there
        with contextlib.suppress(BaseException):
            stream.flush()
    os._exit(1)


def _without_own_frames(traceback: TracebackType | None) -> TracebackType | None:
    """Leave out the frames of this file and of `interpreter`, and those of the import system that lead to them."""
    kept: list[TracebackType] = []
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename not in (__file__, _INTERPRETER):
            kept.append(traceback)
        else:
            while kept and interpreter.is_import_system(kept[-1].tb_frame.f_code):
                kept.pop()
        traceback = traceback.tb_next
    following: TracebackType | None = None
    for each in reversed(kept):
        each.tb_next = following
        following = each
    return following


def _print_nothing(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    pass


if __name__ == "__main__":
    main(sys.argv[1:])
