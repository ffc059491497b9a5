"""The closing report, as text."""

from __future__ import annotations

from pathlib import Path

from allstep.launch.ending import WorkerEnd
from allstep.launch.report import LINES, failure_report, last_lines

TRACEBACK = 'Traceback (most recent call last):\n  File "t.py", line 3, in <module>\nValueError: bad batch\n'


def test_the_report_names_rank_code_log_traceback_and_what_became_of_the_others() -> None:
    cause = WorkerEnd(2, 3, 0.0, stderr="some warning\n" + TRACEBACK)
    ends = [
        WorkerEnd(0, 0, 0.0),
        WorkerEnd(1, -9, 1.0, killed=True),
        cause,
        WorkerEnd(3, -9, 1.0, killed=True),
        WorkerEnd(4, -9, 1.0, killed=True),
        WorkerEnd(5, 1, 0.5),
    ]
    assert failure_report(cause, ends, name="exp", log=Path("runs/exp/attempt_0/rank_2.log")) == (
        "run exp failed: rank 2 of 6 failed first, exit code 3\n"
        "  its output: runs/exp/attempt_0/rank_2.log\n"
        "  its last lines on standard error:\n"
        "    Traceback (most recent call last):\n"
        '      File "t.py", line 3, in <module>\n'
        "    ValueError: bad batch\n"
        "  rank 0: finished without error\n"
        "  ranks 1, 3-4: ended by allstep\n"
        "  rank 5: failed too, exit code 1\n"
    )


def test_a_death_by_sigkill_from_outside_is_explained() -> None:
    cause = WorkerEnd(0, -9, 0.0)
    assert failure_report(cause, [cause], name="exp", log=None) == (
        "run exp failed: rank 0 of 1 failed first, killed by SIGKILL (exit code 137)\n"
        "  SIGKILL came from outside the run; when memory runs short the kernel sends it (see dmesg)\n"
        "  it wrote nothing to standard error\n"
    )


def test_the_last_lines_begin_at_a_traceback_or_crash_dump_and_keep_chained_ones() -> None:
    chained = TRACEBACK + "\nDuring handling of the above exception, another exception occurred:\n\n" + TRACEBACK
    assert last_lines("loading\n" + chained) == chained.rstrip().split("\n")
    crash = "Fatal Python error: Segmentation fault\n\nCurrent thread 0x1:\n  File x"
    assert last_lines("loading\n" + crash) == crash.split("\n")


def test_the_prefix_that_torch_puts_before_a_traceback_is_left_out() -> None:
    prefixed = "".join(f"[rank12]: {line}\n" for line in TRACEBACK.splitlines())
    assert last_lines("[W718] loading\n" + prefixed) == TRACEBACK.rstrip().split("\n")


def test_without_a_traceback_the_last_lines_are_the_last_lines() -> None:
    lines = [f"line {number}" for number in range(3 * LINES)]
    assert last_lines("\n".join(lines)) == lines[-LINES:]
    assert last_lines("") == []
    assert last_lines("\n \n") == []


def test_of_a_progress_bar_only_its_last_state_is_shown() -> None:
    assert last_lines("\r 10%\r 20%\r 30%\nboom\r\n") == [" 30%", "boom"]
