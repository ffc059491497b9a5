"""`allstep rehearse`: interrupt a script here as a cluster would, let it go on, and compare it with an unbroken run.

Contract: reads the command line; everything after the script's name belongs to the script. `allstep.rehearsal` does the
rest. What is done next goes to standard error, the report to standard output. Exit codes: 0 the run went on as if
nothing had happened; 1 it did not; 2 nothing was rehearsed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from allstep.cli.active_environment import change_to_active_environment
from allstep.cli.parser import Parser
from allstep.cli.run_command import add_option, split_command
from allstep.errors import printable
from allstep.protocol.masking import secret_values
from allstep.rehearsal.interruption import KINDS
from allstep.rehearsal.rehearsal_request import OPTIONS, RehearsalRequest

USAGE = "allstep rehearse preemption|requeue|failure|time-limit [options] [-m] script [args ...]"

DESCRIPTION = """\
Run a script small on this machine, interrupt it as a cluster would, start it again as the cluster would, and compare
what it saves last with an unbroken run, bit by bit. Say "exact", or what differs and why. The script is not changed:
it trains for some iterations, saves to a folder of the rehearsal, and ends.

  preemption   the notice SIGUSR1; when its lead time is over SIGTERM, then SIGKILL
  requeue      the same to a SLURM job of allstep submit, which is put back into its queue (SLURM_RESTART_COUNT)
  failure      SIGKILL to one rank; allstep run begins anew
  time-limit   SIGTERM, then SIGKILL, without a notice; the next job goes on
"""

EPILOG = """\
exit code:
  0  the run went on as if nothing had happened: exact, or close at another number of ranks
  1  it did not; what differs and why is said
  2  nothing was rehearsed: a wrong command line, or a script that is not there

examples:
  allstep rehearse preemption train.py --lr 0.1
  allstep rehearse failure --ranks 4 --rank 2 train.py
  allstep rehearse requeue --ranks 2 --then-ranks 4 --iterations 60 train.py
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return the exit code."""
    change_to_active_environment(["rehearse", *argv])
    parser = _parser(secret_values(argv, os.environ))
    # The kind stands before the options, between them or behind them.
    own, rest = split_command(argv, _WITH_VALUE)
    more, rest = split_command(rest[1:], _WITH_VALUE) if rest[:1] and rest[0] in KINDS else ([], rest)
    own += [*argv[len(own) : len(own) + 1], *more]
    given = vars(parser.parse_args(own))
    if not rest:
        parser.error(f"{'a module' if given.get('module') else 'a script'} to rehearse is missing")
    as_json, variables = given.pop("json", False), given.pop("env", [])
    request = RehearsalRequest(
        **given,
        target=rest[0],
        arguments=tuple(rest[1:]),
        env={name: value for each in variables for name, value in each.items()},
    )
    # By its name, for it needs torch, which the launcher's process does without.
    report: Any = importlib.import_module("allstep.rehearsal.rehearsing").rehearse(request, _say)
    print(json.dumps(report.as_dict(), indent=1) if as_json else report)
    return 0 if report.is_good else 1


def _say(line: str) -> None:
    print(printable(f"allstep: {line}"), file=sys.stderr, flush=True)


_WITH_VALUE = frozenset(option.flag for option in OPTIONS if option.constant is None)


def _parser(secrets: frozenset[str]) -> argparse.ArgumentParser:
    parser = Parser(
        secrets=secrets,
        prog="allstep rehearse",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("kind", choices=KINDS, metavar="|".join(KINDS), help="what happens to the run")
    for option in OPTIONS:
        add_option(parser, option)
    parser.add_argument("-m", dest="module", action="store_true", help="script is the name of a module")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    return parser
