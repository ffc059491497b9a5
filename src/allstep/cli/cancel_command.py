"""`allstep cancel`: end runs, with a save first.

Contract: `allstep.run_control.cancelling` says who is told what. A line is printed for each run that was told. Exit
codes: 0 all were told; 1 one could not be, or is over, and a line on standard error says why; 2 a wrong command line,
or no such run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from allstep.cli.tables import run_parser
from allstep.errors import RunControlError, printable
from allstep.run_control.cancelling import cancel
from allstep.run_control.run_search import find_runs
from allstep.run_control.run_status import OVER, statuses
from allstep.submission import slurm_commands

DESCRIPTION = """\
End a run: its ranks stop after the same iteration and save, where the script has `allstep.Preemption` or
`StopOnSignal`, and nothing starts it again. RUN is a run's name, the path of its folder, or a SLURM job's number; the
number of an array is for all of its members.
"""

EPILOG = """\
exit code:
  0  told
  1  it could not be told, or is over
  2  wrong command line, or no such run

examples:
  allstep cancel train-20261130-2315
  allstep cancel 4711 --now
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return the exit code."""
    parser = run_parser("cancel", DESCRIPTION, EPILOG)
    parser.add_argument("run", metavar="RUN", help="which run")
    parser.add_argument("--now", action="store_true", help="at once, without a save")
    arguments = parser.parse_args(argv)
    found = find_runs(arguments.runs, arguments.run)
    failed = False
    for run in found:
        if run.array:
            continue
        (status,) = statuses([run])
        if len(found) > 1 and status.state in OVER:  # of an array, those that are not
            continue
        try:
            print(printable(cancel(run, status, now=arguments.now)), flush=True)
        except RunControlError as error:
            failed = True
            print(f"allstep: error: {printable(str(error))}", file=sys.stderr)
    # Members that have not begun have no folder; nothing of theirs is to be saved.
    for waiting in statuses([run for run in found if run.array]):
        if waiting.state == "queued":
            failure = slurm_commands.cancel(waiting.job)
            failed |= failure is not None
            print(printable(f"run {waiting.run}: {failure or f'job {waiting.job} is cancelled'}"), flush=True)
    return int(failed)
