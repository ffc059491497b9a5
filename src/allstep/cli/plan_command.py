"""`allstep plan`: what a script's training takes on each rank, without devices.

Contract: the script runs in this process up to its first training steps, on tensors without values and as the first of
ranks that are not there; `allstep.planned_script` says how. What it prints goes to standard error, the plan to standard
output. Exit codes: 0 it fits, or nobody asked; 1 it does not fit `--memory`; 2 nothing was planned.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from allstep.cli.active_environment import change_to_active_environment
from allstep.cli.parser import Parser
from allstep.cli.run_command import split_command
from allstep.errors import AllstepError
from allstep.exit_codes import LAUNCHER_ERROR
from allstep.placement import parse_mesh
from allstep.protocol.masking import secret_values

USAGE = "allstep plan [options] [-m] script [args ...]"

DESCRIPTION = """\
Say what training takes on each rank, memory and messages, before there are any devices.

The script runs in one process until its engine has taken two optimizer steps on tensors that have shapes and no
values. Its own arguments count: the batch is the first that its loader gives to rank 0. Kernels are those of the CPU.
"""

EPILOG = """\
exit code:
  0  it fits --memory, or that was not given
  1  it does not fit
  2  nothing was planned: a wrong command line, or a script that cannot be planned

examples:
  allstep plan --nproc 8 --mesh shard=8 examples/language_model.py --width 1024
  allstep plan --mesh replicate=8,shard=64 --memory 80GB train.py
  allstep plan --json train.py
"""

_WITH_VALUE = frozenset({"--nproc", "--mesh", "--memory"})


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return the exit code."""
    change_to_active_environment(["plan", *argv])
    own, rest = split_command(argv, _WITH_VALUE)
    parser = _parser(secret_values(argv, os.environ))
    given = parser.parse_args(own)
    if not rest:
        parser.error(f"{'a module' if given.module else 'a script'} to plan is missing")
    # By their names, for these need torch, which the launcher's process does without.
    planning = importlib.import_module("allstep.planning")
    memory = None if given.memory is None else planning.bytes_of(given.memory)
    mesh = None if given.mesh is None else parse_mesh(given.mesh)
    planned_script = importlib.import_module("allstep.planned_script")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            plan: Any = planned_script.plan_script(
                rest[0], rest[1:], is_module=given.module, ranks=given.nproc, mesh=mesh, memory=memory
            )
    except AllstepError:
        raise
    except Exception:
        traceback.print_exc()
        return LAUNCHER_ERROR
    print(json.dumps(plan.as_dict(), indent=1) if given.json else plan)
    return int(memory is not None and not plan.fits(memory))


def _parser(secrets: frozenset[str]) -> argparse.ArgumentParser:
    parser = Parser(secrets=secrets, prog="allstep plan", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--nproc", type=_count, metavar="N", help="ranks (default: what the mesh makes up, or 1)")
    parser.add_argument("--mesh", metavar="MESH", help="such as replicate=2,shard=4; before what the script says")
    parser.add_argument(
        "--memory", metavar="SIZE", help="of a device, such as 80GB: say whether it fits, and what would"
    )
    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    parser.add_argument("-m", dest="module", action="store_true", help="run a module, as python -m")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks from 1")
    return int(text)
