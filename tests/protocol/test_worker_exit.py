"""What the end of a process, or an exception, says of itself."""

from __future__ import annotations

import signal

import pytest

from allstep.protocol.worker_exit import about_another_rank, describe, exit_status


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


class NoText:
    def __str__(self) -> str:
        raise TypeError("no text")


@pytest.mark.parametrize(
    ("error", "derived"),
    [
        (RuntimeError(NoText()), False),
        (RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:3456"), True),
        (RuntimeError("[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # somebody's download
        (ValueError("connection closed"), False),
        (RuntimeError("Caught X in DataLoader worker process 0.\nOriginal Traceback ...\nX: broken pipe"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), False),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (MemoryError(), False),
        (FloatingPointError("Function 'MulBackward0' returned nan values in its 0th output."), False),
    ],
)
def test_an_exception_about_another_rank_is_known_by_its_kind(error, derived):
    assert about_another_rank(error) is derived
