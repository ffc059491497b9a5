"""Writing to readers that are slow or gone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from allstep.launch.output import NonBlockingOutput


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


def read_all(fd: int) -> bytes:
    os.set_blocking(fd, False)
    read = b""
    try:
        while data := os.read(fd, 1 << 20):
            read += data
    except BlockingIOError:
        pass
    return read


def test_a_full_pipe_makes_nobody_wait_and_loses_nothing(pipe: tuple[int, int]) -> None:
    outlet = NonBlockingOutput(pipe[1])
    data = bytes(range(256)) * 4096  # a mebibyte, far more than a pipe holds
    outlet.write(data)
    assert 0 < outlet.backlog < len(data)
    got = b""
    while outlet.backlog:
        got += read_all(pipe[0])
        outlet.flush()
    assert got + read_all(pipe[0]) == data


def test_a_reader_that_is_gone_closes_the_outlet(pipe: tuple[int, int]) -> None:
    outlet = NonBlockingOutput(pipe[1])
    outlet.write(b"read\n")
    assert not outlet.closed
    os.close(pipe[0])
    outlet.write(b"x" * 100_000)
    assert outlet.closed
    assert outlet.backlog == 0
    outlet.write(b"dropped")
    assert outlet.backlog == 0


def test_a_descriptor_made_non_blocking_by_another_works_too(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    outlet = NonBlockingOutput(pipe[1])
    outlet.write(b"x" * 300_000)
    assert not outlet.closed
    assert len(read_all(pipe[0])) + outlet.backlog == 300_000
