"""A rank's status line: taken out of what it writes, and shown below all lines on the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allstep.handlers.progress_screens import LauncherScreen
from allstep.launch.output import RankOutput, Stream, TerminalOutput
from allstep.launch.status_line import StatusLine
from allstep.protocol.status_frames import StatusFrames, status_frame

FRAME = b"\x1b]allstep;%s\x07"
ERASE = b"\r\x1b[K"


@pytest.mark.parametrize(
    ("chunks", "lines", "statuses"),
    [
        ([b"a\nb\n"], b"a\nb\n", []),
        ([b"a\n" + FRAME % b"10%" + b"b\n"], b"a\nb\n", [b"10%"]),
        ([FRAME % b"10%" + FRAME % b"20%"], b"", [b"20%"]),
        ([b"a\x1b]allst", b"ep;10%\x07b"], b"ab", [b"10%"]),
        ([b"\x1b]allstep;1", b"0", b"%\x07"], b"", [b"10%"]),
        ([b"\x1b[1mbold\x1b[0m"], b"\x1b[1mbold\x1b[0m", []),
        ([FRAME % b""], b"", [b""]),
        ([b"\x1b]allstep;" + b"x" * 10_000], b"\x1b]allstep;" + b"x" * 10_000, []),
    ],
)
def test_a_status_line_is_taken_out_of_the_bytes(chunks: list[bytes], lines: bytes, statuses: list[bytes]) -> None:
    frames = StatusFrames()
    read = [frames.feed(chunk) for chunk in chunks]
    assert b"".join(rest for rest, _ in read) + frames.rest() == lines
    assert [status for _, status in read if status is not None] == statuses


@given(
    st.lists(st.sampled_from([b"a\n", b"\x1b", b"\x1b]alls", FRAME % b"10%", b"[K", b"\x07"]), max_size=8), st.data()
)
def test_how_the_bytes_are_cut_into_reads_loses_none(parts: list[bytes], data: st.DataObject) -> None:
    text = b"".join(parts)
    at = data.draw(st.integers(0, len(text)))
    whole, pieces = StatusFrames(), StatusFrames()
    expected = whole.feed(text)[0] + whole.rest()
    assert pieces.feed(text[:at])[0] + pieces.feed(text[at:])[0] + pieces.rest() == expected


def test_what_a_ranks_screen_draws_is_its_status_line(capfd: pytest.CaptureFixture[str]) -> None:
    LauncherScreen(80).draw("10%")
    assert StatusFrames().feed(capfd.readouterr().err.encode()) == (b"", b"10%")
    assert StatusFrames().feed(status_frame("10%").encode()) == (b"", b"10%")


def test_lines_stand_above_the_status_line() -> None:
    line = StatusLine(fd=-1)
    assert line.show(b"10%") == b"10%"
    assert line.around(b"[1] hello\n") == ERASE + b"[1] hello\n10%"
    assert line.show(b"20%") == ERASE + b"20%"
    assert line.show(b"") == ERASE
    assert line.around(b"[1] bye\n") == b"[1] bye\n"


def test_an_unfinished_line_keeps_the_status_line_away() -> None:
    line = StatusLine(fd=-1)
    line.show(b"10%")
    assert line.around(b"(Pdb) ") == ERASE + b"(Pdb) "
    assert line.show(b"20%") == b""
    assert line.around(b"next\n") == b"next\n20%"


def test_a_status_line_gives_no_orders_to_the_terminal_and_fits_into_it() -> None:
    assert StatusLine(fd=-1).show(b"\x1b[2J" + b"x" * 200) == b" [2J" + b"x" * 75


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = os.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def outputs_of(fd: int) -> dict[Stream, TerminalOutput]:
    status = StatusLine(fd)
    return {"stdout": TerminalOutput(fd, status), "stderr": TerminalOutput(fd, status)}


def test_it_is_in_no_log_and_goes_with_the_rank_that_showed_it(terminal: tuple[int, int], tmp_path: Path) -> None:
    master, slave = terminal
    log = tmp_path / "rank_0.log"
    shown = outputs_of(slave)
    ranks = [
        RankOutput(rank, {**shown}, prefixed=True, coloured=frozenset(), log=log if rank == 0 else None, warn=print)
        for rank in range(2)
    ]
    ranks[0].feed("stderr", FRAME % b"10%")
    ranks[1].feed("stdout", b"hello\n")
    ranks[0].feed("stdout", b"and I\n")
    ranks[0].end("stderr")
    ranks[1].feed("stdout", b"bye\n")
    expected = b"10%" + ERASE + b"[1] hello\n10%" + ERASE + b"[0] and I\n10%" + ERASE + b"[1] bye\n"
    read = b""
    while len(read) < len(expected):
        read = (read + os.read(master, 1 << 16)).replace(b"\r\n", b"\n")
    assert read == expected
    assert log.read_bytes() == b"and I\n"
    assert ranks[0].last_output() == "and I\n"
