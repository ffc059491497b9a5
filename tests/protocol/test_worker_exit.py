"""The end of a process in words."""

from __future__ import annotations

import signal

import pytest

from allstep.protocol.worker_exit import describe, exit_status


@pytest.mark.parametrize(
    ("returncode", "status", "words"),
    [
        (0, 0, "exit code 0"),
        (7, 7, "exit code 7"),
        (-signal.SIGKILL, 137, "killed by SIGKILL (exit code 137)"),
        (-60, 188, "killed by signal 60 (exit code 188)"),
    ],
)
def test_an_end_is_named_as_a_shell_would_number_it(returncode, status, words):
    assert exit_status(returncode) == status
    assert describe(returncode) == words
