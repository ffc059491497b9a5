"""`allstep history`: the runs of a folder, or the attempts of one run.

Contract: as `allstep status`: reads records, asks SLURM, changes nothing. Exit codes: 0 shown; 2 a wrong command line,
or no such run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from allstep.cli.tables import print_table, run_parser, utc
from allstep.duration_words import took_in_words
from allstep.run_control.run_search import FoundRun, all_runs, find_runs
from allstep.run_control.run_status import RunStatus, statuses
from allstep.run_record.run_history import AttemptHistory

DESCRIPTION = """\
List the runs of a folder, the last one at the end: when each began, how far it came, and how it ended. With a RUN, list
its attempts, across restarts and requeues, with the first cause of each failure.
"""

EPILOG = """\
exit code:
  0  shown
  2  wrong command line, or no such run

examples:
  allstep history
  allstep history -n 50
  allstep history train-20261130-2315
"""

_RUNS = ("RUN", "BEGAN (UTC)", "TOOK", "RANKS", "ATTEMPTS", "REQUEUES", "ITERATION", "SAVED", "STATE", "LAST FAILURE")
_ATTEMPTS = (
    *("ATTEMPT", "BEGAN (UTC)", "TOOK", "RANKS", "NODES", "JOB", "EPOCH", "ITERATION", "SAVES", "OUTCOME"),
    "FIRST CAUSE",
)


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return the exit code."""
    parser = run_parser("history", DESCRIPTION, EPILOG)
    parser.add_argument("run", nargs="?", metavar="RUN", help="the attempts of this run (default: all runs)")
    parser.add_argument("-n", type=int, default=20, metavar="N", help="the last N of them (default: 20)")
    parser.add_argument("--json", action="store_true", help="as JSON: a list with one mapping for each")
    arguments = parser.parse_args(argv)
    if arguments.n < 1:
        parser.error(f"argument -n: n is {arguments.n}; it must be 1 or more")
    if arguments.run is None:
        found = all_runs(arguments.runs)[-arguments.n :]
        shown = statuses(found)
        took = {str(run.folder): _whole(run) for run in found}
        if arguments.json:
            print(json.dumps([asdict(each) | {"whole": took.get(each.folder)} for each in shown], indent=1))
        elif shown:
            print_table([_RUNS, *(_run_row(each, took.get(each.folder)) for each in shown)])
        else:
            print(f"no run in {arguments.runs}")
        return 0
    attempts = [(run, attempt) for run in find_runs(arguments.runs, arguments.run) for attempt in run.history.attempts][
        -arguments.n :
    ]
    if arguments.json:
        print(json.dumps([_attempt_json(run, attempt) for run, attempt in attempts], indent=1))
    elif attempts:
        print_table([_ATTEMPTS, *(_attempt_row(run, attempt) for run, attempt in attempts)])
    else:
        print(f"run {arguments.run} has not begun")
    return 0


def _whole(run: FoundRun) -> float | None:
    """Seconds from a run's first attempt to the last word of it."""
    attempts = run.history.attempts
    return round(run.history.heard - attempts[0].began, 3) if attempts else None


def _run_row(status: RunStatus, whole: float | None) -> tuple[str, ...]:
    return (
        status.run,
        utc(status.began),
        "" if whole is None else took_in_words(whole),
        str(status.world or ""),
        str(status.attempts or ""),
        str(status.requeues or ""),
        "" if status.iteration is None else str(status.iteration),
        "" if status.checkpoint is None else str(status.checkpoint.step),
        status.state,
        "" if status.failure is None else status.failure.what,
    )


def _took(run: FoundRun, attempt: AttemptHistory) -> float:
    """Seconds of an attempt; until it was last heard of, where its end was not noted."""
    if attempt.ended is not None:
        return attempt.ended - attempt.began
    if attempt is run.history.last:
        # One that goes on is known until a moment ago.
        return (run.history.heard if run.history.end else time.time()) - attempt.began
    return max(0.0, float(attempt.progress.get("time", attempt.began)) - attempt.began)


def _outcome(run: FoundRun, attempt: AttemptHistory) -> str:
    """How an attempt ended; empty where it goes on, or nobody noted its end."""
    if attempt.outcome:
        return attempt.outcome
    return "" if attempt is run.history.last else "not noted"


def _attempt_json(run: FoundRun, attempt: AttemptHistory) -> dict[str, Any]:
    return {"run": run.name, **asdict(attempt), "took": round(_took(run, attempt), 3)}


def _attempt_row(run: FoundRun, attempt: AttemptHistory) -> tuple[str, ...]:
    return (
        str(attempt.attempt),
        utc(attempt.began),
        took_in_words(_took(run, attempt)),
        str(attempt.world),
        ",".join(attempt.hosts) or str(attempt.nodes),
        attempt.job,
        str(attempt.progress.get("epoch", "")),
        str(attempt.progress.get("iteration", "")),
        str(attempt.saves),
        _outcome(run, attempt),
        str(attempt.failure.get("what", "")),
    )
