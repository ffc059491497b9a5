"""The process of a rehearsed script: `rehearsed_script.py ORDER script|module TARGET [ARGUMENT...]`.

Contract: `one_start` has `allstep run` start this file as the script of each rank. It runs the script as `python
TARGET` or `python -m TARGET` would, with a `ScriptWatch` around it. The imports say what scripts need, so that the
ranks of one machine import it once (`allstep.launch.shared_imports`).
"""

import os
import sys

from torch import optim  # noqa: F401

from allstep.launch.worker import run_module, run_script
from allstep.rehearsal.iteration_trace import StartOrder
from allstep.rehearsal.script_watch import ScriptWatch


def main(argv: list[str]) -> None:
    """Run what the command line says."""
    order, kind, target, *arguments = argv
    watch = ScriptWatch(StartOrder.parse(order), start=int(os.environ["ALLSTEP_ATTEMPT"]), rank=int(os.environ["RANK"]))
    del sys.path[0]  # the folder of this file
    with watch.in_place():
        (run_module if kind == "module" else run_script)(target, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
