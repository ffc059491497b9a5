"""The adversarial network over two processes: its drawings come nearer to real digits, and the grid is a PNG file."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import pytest

from tests.examples.launching import TWO_RANKS, run


def read_png(path: Path) -> tuple[int, int, bytes]:
    """Width, height and pixels of a grey PNG file without row filters."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, {}
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        found[kind] = body
        at += 12 + length
    width, height, *form = struct.unpack(">IIBBBBB", found[b"IHDR"])
    assert form == [8, 0, 0, 0, 0]
    rows = zlib.decompress(found[b"IDAT"])
    assert len(rows) == height * (width + 1)
    return width, height, b"".join(rows[1 + at * (width + 1) : (at + 1) * (width + 1)] for at in range(height))


@pytest.mark.slow
@pytest.mark.nightly
def test_drawings_come_nearer_to_real_digits_over_two_processes(tmp_path: Path) -> None:
    printed = run(TWO_RANKS, "gan.py", "--epochs", 10, "--grid", tmp_path / "grid.png", folder=tmp_path)
    read = re.search(r"the classifier reads (\S+) of the test digits", printed)
    assert read is not None
    assert float(read[1]) > 0.9
    epochs = [tuple(map(float, found)) for found in re.findall(r"fid (\S+), inception_score (\S+)", printed)]
    assert len(epochs) == 10
    (first_distance, first_score), (last_distance, last_score) = epochs[0], epochs[-1]
    assert last_distance < first_distance / 1.5
    assert last_score > first_score + 0.5
    width, height, pixels = read_png(tmp_path / "grid.png")
    assert width == height == 400
    assert len(set(pixels)) > 50
