"""The process from which the workers of one machine are forked, after the imports that they all begin with.

Contract: the supervisor (`forking`) starts this file by its path, as
`python template.py SUPERVISOR_PID LIFELINE_FD PLAN_FD script|module TARGET [ARGUMENT...]`, in a session of its own
and with the variables that all workers share. PLAN_FD is a file with a JSON object:
- `modules`: what to import; `module:name` for a name that a module imports when it is first used.
- `ranks`: for each its own `environment`, its `stdout`, `stderr` and `lifeline` descriptors, and `store`, the socket on
  which it serves the ranks' store, or null.
- `report` and `release`: descriptors of two pipes, the first to write to, the second to read from.
What it does:
1. It imports the modules. When one cannot be imported, or they have left something that processes cannot share (a
   thread, an open descriptor such as a device's, a process), or one of all that they brought is another in the script's
   folder, it ends with status `START_EACH` and has forked nothing.
2. It forks the workers, writes their pids to `report` as a JSON list, and ends with status 0. Till then they are in its
   process group, so that killing that ends all of them.
3. A worker waits until the last write end of the pipe `release` closes. By then it is the supervisor's child (which is
   its nearest subreaper), or the supervisor is gone. From there on it leads a session of its own, is tied to the
   supervisor as `worker` has it, and has its rank's variables and output, numbers of its own from the global
   generators, and nothing of the other ranks. Then it runs the script as `worker` does.
Standard library only, and nothing of allstep but `worker.py` beside it and what the supervisor's plan names.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # this file's folder; see worker.py

import gc
import json
import os
from importlib import import_module
from importlib.machinery import PathFinder, SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from allstep.launch import worker
else:
    # By its path, since allstep's own __init__ is not to run, and under no name that a script could meet.
    worker = ModuleType("_allstep_worker")
    worker.__file__ = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py")
    SourceFileLoader(worker.__name__, worker.__file__).exec_module(worker)

START_EACH = 3
"""Status that asks the supervisor to start the workers one by one."""


def main(argv: list[str]) -> None:
    """Be the template, and in each fork a worker."""
    supervisor, lifeline, plan_fd, kind, target, *arguments = argv
    worker.tie_to_supervisor(int(supervisor), int(lifeline))
    with open(int(plan_fd), encoding="utf-8") as file:
        plan = json.load(file)
    folder = os.getcwd() if kind == "module" else os.path.dirname(os.path.realpath(target))
    if not (
        _import_all(plan["modules"])
        and _can_be_shared(_known_descriptors(plan, int(lifeline)))
        and not _shadows(folder)
    ):
        _end(START_EACH)
    os.close(int(lifeline))  # workers lose the supervisor by their own lifelines; this one's end kills the whole group
    _flush()
    pids = []
    for rank in plan["ranks"]:
        pid = _fork()
        if pid == 0:
            _become_worker(rank, plan, int(supervisor))
            worker.run(kind, target, arguments)
            return
        pids.append(pid)
    os.write(plan["report"], json.dumps(pids).encode())
    _end(0)


def _import_all(modules: list[str]) -> bool:
    """Import them, and return whether that was possible."""
    gc.disable()  # nearly all that is made stays; looking through it again and again took a tenth of the time
    try:
        for module, _, name in (each.partition(":") for each in modules):
            imported = import_module(module)
            if name:
                getattr(imported, name, None)
    except BaseException:
        return False
    finally:
        gc.enable()
    return True


def _known_descriptors(plan: dict[str, Any], lifeline: int) -> set[int]:
    """The descriptors that this process was given, and its standard ones."""
    ends = {rank[name] for rank in plan["ranks"] for name in ("stdout", "stderr", "lifeline", "store")} - {None}
    return {0, 1, 2, lifeline, plan["release"], plan["report"]} | ends


def _can_be_shared(known: set[int]) -> bool:
    """Whether this process has nothing but what every fork of it can have: no child, no thread, nothing else open."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return False
    except ChildProcessError:
        pass
    pid = _fork()  # what can put its threads away for a fork, as the mathematics of numpy does, has done so after this
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    others = set(map(int, os.listdir("/proc/self/fd"))) - known
    return len(os.listdir("/proc/self/task")) == 1 and not any(map(_is_open, others))


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:  # that with which the list was made
        return False
    return True


def _shadows(folder: str) -> bool:
    """Whether the script's folder, where it looks first, has a module of the name of one that was imported."""
    imported = {name.partition(".")[0] for name in sys.modules}
    names = imported & {entry.partition(".")[0] for entry in os.listdir(folder)}
    return any(spec.origin is not None for name in names if (spec := PathFinder.find_spec(name, [folder])) is not None)


def _fork() -> int:
    """Fork; where that is not possible, the supervisor starts the workers and reports what is wrong."""
    try:
        return os.fork()
    except OSError:
        _end(START_EACH)


def _become_worker(rank: dict[str, Any], plan: dict[str, Any], supervisor: int) -> None:
    """Be the worker of this rank, as soon as the supervisor has adopted it."""
    os.close(plan["report"])
    os.read(plan["release"], 1)
    os.close(plan["release"])
    os.setsid()
    worker.tie_to_supervisor(supervisor, rank["lifeline"])
    os.dup2(rank["stdout"], 1)
    os.dup2(rank["stderr"], 2)
    for each in plan["ranks"]:
        others = [fd for fd in (each["lifeline"], each["store"]) if fd is not None] if each is not rank else []
        for fd in (each["stdout"], each["stderr"], *others):
            os.close(fd)
    os.environ.update(rank["environment"])
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # Python's own generator is seeded anew by os.fork


def _end(status: int) -> NoReturn:
    """End without the exit handlers of what was imported: those are the workers'."""
    _flush()
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
