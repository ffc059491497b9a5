"""`allstep status`: where runs are and how they are.

Contract: reads records and asks SLURM, each question bounded in time; changes nothing. Exit codes: 0 shown, also where
SLURM gave no answer; 2 a wrong command line, or no such run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict

from allstep.cli.tables import print_table, run_parser, shown_rate
from allstep.duration_words import took_in_words
from allstep.errors import printable
from allstep.run_control.run_search import all_runs, find_runs
from allstep.run_control.run_status import OVER, RunStatus, statuses

DESCRIPTION = """\
Say where runs are: state, nodes, attempt, epoch and iteration, rate, time left, last checkpoint, and the first cause of
the last failure. RUN is a run's name, the path of its folder, or a SLURM job's number. Without one, all runs that are
not over are shown, or the last one.
"""

EPILOG = """\
exit code:
  0  shown
  2  wrong command line, or no such run

examples:
  allstep status
  allstep status train-20261130-2315
  allstep status 4711 --json
"""

_HEADINGS = (
    *("RUN", "STATE", "NODES", "ATTEMPT", "EPOCH", "ITERATION", "RATE", "LEFT", "LIMIT", "SAVED", "LAST FAILURE"),
)
_LONGEST = 60  # characters of a first cause in a table


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return the exit code."""
    parser = run_parser("status", DESCRIPTION, EPILOG)
    parser.add_argument("run", nargs="?", metavar="RUN", help="which run (default: all that are not over)")
    parser.add_argument("--json", action="store_true", help="as JSON: a list with one mapping for each run")
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        every = statuses(all_runs(arguments.runs))
        shown = [status for status in every if status.state not in OVER] or every[-1:]
    else:
        shown = statuses(find_runs(arguments.runs, arguments.run))
    if arguments.json:
        print(json.dumps([asdict(status) for status in shown], indent=1))
    elif not shown:
        print(f"no run in {arguments.runs}")
    elif len(shown) == 1:
        for line in details(shown[0], time.time()):
            print(printable(line))
    else:
        print_table([_HEADINGS, *map(_row, shown)])
    return 0


def details(status: RunStatus, now: float) -> list[str]:
    """All that there is to say of a run, a line for each kind of it; `now` in seconds since 1970."""
    what = {
        "run": f"{status.run}, in {status.folder}",
        "state": f"{status.state}: {status.why}" if status.why else status.state,
        "job": status.job,
        "nodes": status.nodes,
        "attempt": _attempt(status),
        "progress": _progress(status),
        "time": _time(status),
        "saved": "",
        "failed": "",
    }
    if status.checkpoint is not None:
        saved = status.checkpoint
        ago = took_in_words(max(0.0, now - saved.time))
        what["saved"] = f"iteration {saved.step}, {ago} ago, in {took_in_words(saved.seconds)}: {saved.address}"
    if status.failure is not None:
        failure = status.failure
        ago = took_in_words(max(0.0, now - failure.time))
        report = f"; see {failure.report}" if failure.report else ""
        what["failed"] = f"attempt {failure.attempt}, {ago} ago: {failure.what}{report}"
    return [f"{name:<9} {text}" for name, text in what.items() if text]


def _attempt(status: RunStatus) -> str:
    if status.attempt is None:
        return ""
    words = f"{status.attempt}, of {status.world} rank{'' if status.world == 1 else 's'}"
    if status.took is not None:
        words += f", {took_in_words(status.took)} long"
    if status.attempts > 1:
        words += f"; {status.attempts} attempts in all"
    times = "once" if status.requeues == 1 else f"{status.requeues} times"
    return words + (f", requeued {times}" if status.requeues else "")


def _progress(status: RunStatus) -> str:
    if status.iteration is None:
        return ""
    words = f"epoch {status.epoch}, iteration {status.iteration}"
    if status.goal:
        words += f" of {status.goal} ({status.iteration / status.goal:.1%})"
    return words + (f", {shown_rate(status.rate)}" if status.rate else "")


def _time(status: RunStatus) -> str:
    left = f"{took_in_words(status.left)} left at this rate" if status.left is not None else ""
    limit = f"{took_in_words(status.limit)} until the job's limit" if status.limit is not None else ""
    return ", ".join(filter(None, (left, limit)))


def _row(status: RunStatus) -> tuple[str, ...]:
    cause = status.failure.what if status.failure is not None else ""
    return (
        status.run,
        status.state,
        status.nodes,
        "" if status.attempt is None else str(status.attempt),
        "" if status.epoch is None else str(status.epoch),
        "" if status.iteration is None else f"{status.iteration}{f'/{status.goal}' if status.goal else ''}",
        shown_rate(status.rate),
        "" if status.left is None else took_in_words(status.left),
        "" if status.limit is None else took_in_words(status.limit),
        "" if status.checkpoint is None else str(status.checkpoint.step),
        cause if len(cause) <= _LONGEST else f"{cause[:_LONGEST]}...",
    )
