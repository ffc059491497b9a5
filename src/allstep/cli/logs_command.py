"""`allstep logs`: what a run's ranks printed, across attempts and requeues, and with -f what they go on to print.

Contract: changes nothing. With -f it ends when nothing more comes of the run, or at Ctrl-C. Exit codes: 0 shown; 2 a
wrong command line, no such run, or no output that is kept; 130 Ctrl-C.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

from allstep.cli.tables import run_parser
from allstep.errors import RunControlError, printable
from allstep.run_control.run_logs import LogFile, RunLogs
from allstep.run_control.run_search import FoundRun, find_runs, read_run
from allstep.run_control.run_status import FRESH_S, OVER, statuses

DESCRIPTION = """\
Show what the ranks of a run printed, in the order of its attempts, restarts and requeues included. Without --rank, each
line has its rank before it; ranks come one after another, since logs have no times. RUN is a run's name, the path of
its folder, or a SLURM job's number.
"""

EPILOG = """\
exit code:
  0  shown
  2  wrong command line, no such run, or no output that is kept

examples:
  allstep logs train-20261130-2315
  allstep logs -f --rank 3 4711
  allstep logs -n 20 train-20261130-2315
  allstep logs --job 4711
"""

_LOOK_S = 0.2  # from one look at the files to the next
_ASK_S = 5.0  # from one question whether more will come to the next


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return the exit code."""
    parser = run_parser("logs", DESCRIPTION, EPILOG)
    parser.add_argument("run", metavar="RUN", help="which run")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as more comes, until the run is over")
    parser.add_argument("--rank", type=int, metavar="R", help="of this rank alone, as it printed it")
    parser.add_argument("-n", type=int, metavar="N", help="of each file, the last N lines of what is there")
    parser.add_argument("--job", action="store_true", help="the log of the SLURM job, in place of the ranks'")
    arguments = parser.parse_args(argv)
    for name in ("rank", "n"):
        if (value := getattr(arguments, name)) is not None and value < 0:
            parser.error(f"argument {name} is {value}; it must be 0 or more")
    found = [run for run in find_runs(arguments.runs, arguments.run) if not run.array]
    if len(found) != 1:
        names = ", ".join(run.name for run in found) or "none, since no member has begun"
        raise RunControlError(f"{arguments.run} is an array; name one of its runs: {names}")
    run = found[0]
    logs = RunLogs(run.folder, arguments.rank, arguments.job)
    printer = _Printer(is_single=arguments.rank is not None)
    logs.check(run, will_come=arguments.follow and not _is_over(run))
    printer.show(logs.read(arguments.n))
    if arguments.follow:
        _follow(run, logs, printer)
    printer.show(logs.rest())
    return 0


def _follow(run: FoundRun, logs: RunLogs, printer: _Printer) -> None:
    ask_at = 0.0
    while True:
        is_over = False
        if time.monotonic() >= ask_at:
            is_over = _is_over(run)
            ask_at = time.monotonic() + _ASK_S
        # What came before it was over is shown too.
        printer.show(logs.read())
        if is_over:
            return
        time.sleep(_LOOK_S)  # a disk of another machine's tells nobody that a file has grown


def _is_over(run: FoundRun) -> bool:
    again = read_run(run.folder)
    if again is None:
        return True
    # SLURM is not to be asked every few seconds about a run that is being heard of.
    history = again.history
    if again.job and history.last and not history.end and time.time() - history.heard < FRESH_S:
        return False
    return statuses([again])[0].state in OVER


class _Printer:
    """Prints lines of files, with a heading where the attempt changes."""

    def __init__(self, *, is_single: bool) -> None:
        self._is_single = is_single
        self._shown: str | None = None

    def show(self, parts: Iterable[tuple[LogFile, list[str]]]) -> None:
        for file, lines in parts:
            self._head(file)
            before = "" if self._is_single or file.rank < 0 else f"[{file.rank}] "
            for line in lines:
                print(f"{before}{line.rstrip(chr(13))}")
        sys.stdout.flush()

    def _head(self, file: LogFile) -> None:
        heading = f"attempt {file.attempt}" if file.rank >= 0 else file.label
        if heading != self._shown:
            self._shown = heading
            print(printable(f"==> {heading} <=="), flush=True)
