"""Which end is the cause of the others."""

from __future__ import annotations

import signal

import pytest

from allstep.launch.ending import SETTLE, WorkerEnd, describe, exit_status, first_cause

LOST = "Traceback (most recent call last):\nRuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:3456\n"
OWN = "Traceback (most recent call last):\nValueError: bad batch\n"
SOON, LATE = SETTLE / 2, SETTLE * 2


@pytest.mark.parametrize(
    ("ends", "rank"),
    [
        ([], None),
        ([WorkerEnd(0, 0, 1.0), WorkerEnd(1, 0, 2.0)], None),
        ([WorkerEnd(0, 0, 0.0), WorkerEnd(1, 3, 9.0)], 1),
        ([WorkerEnd(0, -9, 1.0, killed=True), WorkerEnd(1, 1, 0.5)], 1),
        # the order of exit decides between equals
        ([WorkerEnd(0, 1, SOON, stderr=OWN), WorkerEnd(1, 1, 0.0, stderr=OWN)], 1),
        ([WorkerEnd(0, 1, 0.0, stderr=OWN), WorkerEnd(1, 1, 0.0, stderr=OWN)], 0),
        # a lost connection comes from another's end
        ([WorkerEnd(0, 1, 0.0, stderr=LOST), WorkerEnd(1, 1, SOON, stderr=OWN)], 1),
        ([WorkerEnd(0, 1, 0.0, stderr=LOST), WorkerEnd(1, 1, LATE, stderr=OWN)], 0),
        ([WorkerEnd(0, 1, 0.0, stderr=LOST), WorkerEnd(1, -signal.SIGKILL, SOON)], 1),
        ([WorkerEnd(0, 1, 0.0, stderr=OWN), WorkerEnd(1, -signal.SIGSEGV, SOON)], 1),
        # a library that aborts because its peer is gone
        ([WorkerEnd(0, -signal.SIGABRT, 0.0, stderr="ProcessGroupNCCL: DistBackendError"), WorkerEnd(1, 1, SOON)], 1),
        ([WorkerEnd(0, -signal.SIGABRT, SOON, stderr="free(): invalid pointer"), WorkerEnd(1, 1, 0.0, stderr=LOST)], 0),
        # long ago does not count
        ([WorkerEnd(0, 1, 0.0, stderr=LOST + OWN * 12), WorkerEnd(1, 1, SOON, stderr=OWN)], 0),
    ],
)
def test_the_cause_is_the_first_failure_that_is_not_the_result_of_another(
    ends: list[WorkerEnd], rank: int | None
) -> None:
    cause = first_cause(ends)
    assert (None if cause is None else cause.rank) == rank


@pytest.mark.parametrize(
    ("returncode", "status", "words"),
    [
        (0, 0, "exit code 0"),
        (7, 7, "exit code 7"),
        (-9, 137, "killed by SIGKILL (exit code 137)"),
        (-15, 143, "killed by SIGTERM (exit code 143)"),
        (-60, 188, "killed by signal 60 (exit code 188)"),
    ],
)
def test_an_end_is_named_as_a_shell_would_number_it(returncode: int, status: int, words: str) -> None:
    assert exit_status(returncode) == status
    assert describe(returncode) == words
