"""What ranks write: whole lines with their rank, and readers that are slow or gone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allstep.launch.output import LONGEST_LINE, NonBlockingOutput, PrefixedLines, RankOutput, Stream, rank_prefix


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


@pytest.mark.parametrize(
    ("chunks", "shown"),
    [
        ([b"a\nb\n"], b"> a\n> b\n"),
        ([b"a", b"b", b"\n"], b"> ab\n"),
        ([b"a\n\nb\n"], b"> a\n> \n> b\n"),
        ([b"unfinished"], b"> unfinished\n"),
        ([b"a\r\nb\r", b"\nc"], b"> a\r\n> b\r\n> c\n"),
        ([b"\r10%\r20%", b"\r30%\n"], b"\r> 10%\r> 20%\r> 30%\n"),
        ([b"\xff\xfe\0\n\x80"], b"> \xff\xfe\0\n> \x80\n"),
        ([b"a\n", b""], b"> a\n"),
        ([b"a\r"], b"> a\r\n"),
        ([b"a\n\r"], b"> a\n"),
        ([], b""),
    ],
)
def test_lines_come_out_whole_with_the_prefix(chunks: list[bytes], shown: bytes) -> None:
    lines = PrefixedLines(b"> ")
    assert b"".join(lines.feed(chunk) for chunk in chunks) + lines.rest() == shown


@given(st.lists(st.binary(max_size=20) | st.sampled_from([b"\n", b"\r", b"\r\n", b"ab"]), max_size=12))
def test_how_the_bytes_are_cut_into_reads_changes_nothing(chunks: list[bytes]) -> None:
    pieces, whole = PrefixedLines(b"> "), PrefixedLines(b"> ")
    in_pieces = b"".join(pieces.feed(chunk) for chunk in chunks) + pieces.rest()
    assert in_pieces == whole.feed(b"".join(chunks)) + whole.rest()


@given(st.binary(max_size=50))
def test_nothing_is_lost_without_a_prefix(data: bytes) -> None:
    lines = PrefixedLines(b"")
    shown = lines.feed(data) + lines.rest()
    assert shown.rstrip(b"\r\n") == data.rstrip(b"\r\n")


def test_a_line_longer_than_the_limit_comes_in_pieces_and_one_below_it_whole() -> None:
    lines = PrefixedLines(b"> ")
    assert lines.feed(b"x" * LONGEST_LINE) == b""
    assert lines.feed(b"\n") == b"> " + b"x" * LONGEST_LINE + b"\n"
    assert lines.feed(b"y" * (LONGEST_LINE + 1)) == b"> " + b"y" * (LONGEST_LINE + 1) + b"\n"
    assert lines.rest() == b""


def rank_output(shown_on: dict[Stream, NonBlockingOutput], *, prefixed: bool) -> RankOutput:
    return RankOutput(0, shown_on, prefixed=prefixed, coloured=frozenset(), log=None, warn=pytest.fail)


def test_without_a_prefix_everything_passes_at_once(pipe: tuple[int, int]) -> None:
    output = rank_output({"stdout": NonBlockingOutput(pipe[1])}, prefixed=False)
    output.feed("stdout", b"(Pdb) ")
    assert read_all(pipe[0]) == b"(Pdb) "
    output.end("stdout")
    assert read_all(pipe[0]) == b""


def test_with_a_prefix_the_end_of_a_stream_ends_its_last_line(pipe: tuple[int, int]) -> None:
    output = rank_output({"stderr": NonBlockingOutput(pipe[1])}, prefixed=True)
    output.feed("stderr", b"no")
    output.feed("stdout", b"not shown\n")
    assert read_all(pipe[0]) == b""
    output.end("stderr")
    assert read_all(pipe[0]) == b"[0] no\n"


def test_the_last_text_of_a_rank_is_kept_whatever_its_encoding() -> None:
    output = rank_output({}, prefixed=True)
    output.feed("stdout", b"x" * 100_000)
    output.feed("stderr", b"def\xff")
    assert output.last_words() == "def\ufffd"
    assert output.last_output() == "x" * (2**16 - 4) + "def\ufffd"


def test_the_prefix_is_the_rank_in_a_colour_of_its_own() -> None:
    assert rank_prefix(12, colour=False) == b"[12] "
    assert rank_prefix(0, colour=True) == b"\x1b[36m[0]\x1b[0m "
    assert rank_prefix(1, colour=True) != rank_prefix(0, colour=True).replace(b"0]", b"1]")


def test_a_full_pipe_makes_nobody_wait_and_loses_nothing(pipe: tuple[int, int]) -> None:
    output = NonBlockingOutput(pipe[1])
    data = bytes(range(256)) * 4096  # a mebibyte, far more than a pipe holds
    output.write(data)
    assert 0 < output.backlog < len(data)
    got = b""
    while output.backlog:
        got += read_all(pipe[0])
        output.flush()
    assert got + read_all(pipe[0]) == data


def test_a_reader_that_is_gone_closes_the_output(pipe: tuple[int, int]) -> None:
    output = NonBlockingOutput(pipe[1])
    output.write(b"read\n")
    assert not output.closed
    os.close(pipe[0])
    output.write(b"x" * 100_000)
    assert output.closed
    assert output.backlog == 0
    output.write(b"dropped")
    assert output.backlog == 0


def test_a_descriptor_made_non_blocking_by_another_works_too(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    output = NonBlockingOutput(pipe[1])
    output.write(b"x" * 300_000)
    assert not output.closed
    assert len(read_all(pipe[0])) + output.backlog == 300_000
