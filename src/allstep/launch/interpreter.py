"""What a worker takes from CPython that is not documented, with what happens where it is missing.

- `runpy._run_module_as_main`, older than Python 3: being `python -m NAME` or `python FOLDER`; the interpreter calls it
  itself. Without it, runpy's public functions, which take the script's names away when it has ended.
- `threading._shutdown` and `atexit._run_exitfuncs`, older than Python 3: doing before `os._exit` what the interpreter's
  end does. Without them, a script that raised ends as the interpreter has it, which takes longer.
- File names that begin with `<frozen importlib`, since Python 3.3: leaving the import system's frames out of a
  traceback, as the interpreter does. Without them, these frames are shown.

Contract: `worker.py` loads this file by its path, before the script decides what is imported; so it uses the standard
library only, and nothing of allstep. Each name is looked for when it is first needed. Where it is missing, one line on
standard error says so, and the next best is done; nothing here raises for it.
"""

import atexit
import contextlib
import runpy
import sys
import threading
from types import CodeType

_said: set[str] = set()


def run_module_as_main(name: str) -> None:
    """Run a module as `python -m NAME` does, in the `__main__` that is in `sys.modules`."""
    run = getattr(runpy, "_run_module_as_main", None)
    if run is not None:
        run(name)
        return
    _warn("runpy._run_module_as_main", "names of the script are gone when its exit handlers run")
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_folder_as_main(path: str) -> None:
    """Run the `__main__.py` of a folder or zip archive, which is first in `sys.path`, as `python PATH` does."""
    run = getattr(runpy, "_run_module_as_main", None)
    if run is not None:
        run("__main__", alter_argv=False)
        return
    _warn("runpy._run_module_as_main", "names of the script are gone when its exit handlers run")
    runpy.run_path(path, run_name="__main__")


def finish_threads_and_handlers() -> bool:
    """Wait for threads that are not daemons and run exit handlers, as the interpreter's end does.

    Returns:
        Whether that was possible; if not, the interpreter's own end has to do it.
    """
    finishing = (getattr(threading, "_shutdown", None), getattr(atexit, "_run_exitfuncs", None))
    if None in finishing:
        _warn("threading._shutdown or atexit._run_exitfuncs", "a script that raised takes longer to end")
        return False
    for finish in finishing:
        with contextlib.suppress(BaseException):  # the process is to end whatever a thread or handler does
            finish()  # type: ignore[misc]  # neither is None
    return True


def is_import_system(code: CodeType) -> bool:
    """Whether code is the import system's, which the interpreter leaves out of tracebacks."""
    return code.co_filename.startswith("<frozen importlib")


def _warn(name: str, effect: str) -> None:
    if name not in _said:
        _said.add(name)
        print(f"allstep: warning: this Python has no {name}; {effect}", file=sys.stderr, flush=True)
