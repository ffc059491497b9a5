"""Cutting ranks' bytes into lines that never mix."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allstep.launch.output import LONGEST, Lines, Tail, Verbatim, rank_prefix


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
    lines = Lines(b"> ")
    assert b"".join(lines.feed(chunk) for chunk in chunks) + lines.rest() == shown


@given(st.lists(st.binary(max_size=20) | st.sampled_from([b"\n", b"\r", b"\r\n", b"ab"]), max_size=12))
def test_how_the_bytes_are_cut_into_reads_changes_nothing(chunks: list[bytes]) -> None:
    pieces, whole = Lines(b"> "), Lines(b"> ")
    in_pieces = b"".join(pieces.feed(chunk) for chunk in chunks) + pieces.rest()
    assert in_pieces == whole.feed(b"".join(chunks)) + whole.rest()


@given(st.binary(max_size=50))
def test_nothing_is_lost_without_a_prefix(data: bytes) -> None:
    lines = Lines(b"")
    shown = lines.feed(data) + lines.rest()
    assert shown.rstrip(b"\r\n") == data.rstrip(b"\r\n")


def test_a_line_longer_than_the_limit_comes_in_pieces_and_one_below_it_whole() -> None:
    lines = Lines(b"> ")
    assert lines.feed(b"x" * LONGEST) == b""
    assert lines.feed(b"\n") == b"> " + b"x" * LONGEST + b"\n"
    assert lines.feed(b"y" * (LONGEST + 1)) == b"> " + b"y" * (LONGEST + 1) + b"\n"
    assert lines.rest() == b""


def test_verbatim_holds_nothing_back() -> None:
    verbatim = Verbatim()
    assert verbatim.feed(b"(Pdb) ") == b"(Pdb) "
    assert verbatim.rest() == b""


def test_the_tail_keeps_the_last_bytes_and_reads_any_encoding() -> None:
    tail = Tail(limit=4)
    tail.feed(b"abc")
    tail.feed(b"def\xff")
    assert tail.text() == "def\ufffd"


def test_the_prefix_is_the_rank_in_a_colour_of_its_own() -> None:
    assert rank_prefix(12, colour=False) == b"[12] "
    assert rank_prefix(0, colour=True) == b"\x1b[36m[0]\x1b[0m "
    assert rank_prefix(1, colour=True) != rank_prefix(0, colour=True).replace(b"0]", b"1]")
