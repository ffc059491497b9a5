"""The process from which the workers of one machine are forked, after the imports that they all begin with.

Contract: the supervisor starts this file by its path, as
`python template.py SUPERVISOR_PID LIFELINE_FD PLAN_FD script|module TARGET [ARGUMENT...]`, in a session of its own
and with the variables that all workers share. PLAN_FD is a file with a JSON object: `modules` to import (`module:name`
for a name that a module imports when it is first used), `ranks` (of each its own `environment`, and its `stdout`,
`stderr` and `lifeline` descriptors), and the descriptors `report` and `gate`.
- It imports the modules. When these have left something that processes cannot share, a thread or an open descriptor
  (a device's, say), or one cannot be imported, it ends with status `ALONE` and has forked nothing.
- It forks the workers, writes their pids to `report` as a JSON list, and ends with status 0. Till then they are in its
  process group, so that killing that ends all of them.
- A worker waits until the last write end of the pipe `gate` closes. By then it is the supervisor's child (which is its
  nearest subreaper), or the supervisor is gone. It leads a session of its own from there on, is tied to the supervisor
  as `worker` has it, has its rank's variables and output, numbers of its own from numpy's global generator, and nothing
  of the other ranks; then it runs the script as `worker` does.
Standard library only, and nothing of allstep but what the supervisor's plan names.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # this file's folder

import gc
import json
import os
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from allstep.launch import worker

ALONE = 3
"""Status that asks the supervisor to start the workers one by one."""


def main(argv: list[str]) -> None:
    """Be the template, and in each fork a worker."""
    supervisor, lifeline, plan_fd, kind, target, *arguments = argv
    worker.tie_to_supervisor(int(supervisor), int(lifeline))
    with open(int(plan_fd), encoding="utf-8") as file:
        plan = json.load(file)
    if not _import_alike(plan["modules"]):
        _end(ALONE)
    os.close(int(lifeline))  # workers lose the supervisor by their own lifelines; this one's end kills the whole group
    pids = []
    for place in plan["ranks"]:
        pid = os.fork()
        if pid == 0:
            _become(place, plan, int(supervisor))
            worker.run(kind, target, arguments)
            return
        pids.append(pid)
    os.write(plan["report"], json.dumps(pids).encode())
    _end(0)


def _import_alike(modules: list[str]) -> bool:
    """Import them, and return whether processes can share what is there then."""
    descriptors = _descriptors()
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
    return len(os.listdir("/proc/self/task")) == 1 and _descriptors() == descriptors


def _descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def _become(place: dict[str, Any], plan: dict[str, Any], supervisor: int) -> None:
    """Be the worker of this place, as soon as the supervisor has it."""
    os.close(plan["report"])
    os.read(plan["gate"], 1)
    os.close(plan["gate"])
    os.setsid()
    worker.tie_to_supervisor(supervisor, place["lifeline"])
    os.dup2(place["stdout"], 1)
    os.dup2(place["stderr"], 2)
    for each in plan["ranks"]:
        for fd in (each["stdout"], each["stderr"], *([each["lifeline"]] if each is not place else [])):
            os.close(fd)
    os.environ.update(place["environment"])
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()


def _end(status: int) -> NoReturn:
    """End without the exit handlers of what was imported: those are the workers'."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _beside(name: str) -> Any:
    """The module in the file beside this one, under no name that a script could meet."""
    spec = spec_from_file_location(f"_allstep_{name}", os.path.join(os.path.dirname(__file__), f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    worker = _beside("worker")
    main(sys.argv[1:])
