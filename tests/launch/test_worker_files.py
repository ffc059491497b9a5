"""Issue 13 A7: what a script left in the buffers of open files is in them after an exception, as under plain python."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.jobs.launchers import script
from tests.jobs.running import run

WRITES = """
import bz2, gzip, io, lzma, zipfile
text = open("text.txt", "w")
text.write("kept\\n")
binary = open("binary.bin", "wb")
binary.write(b"kept")
packed = gzip.open("packed.gz", "wt")
packed.write("kept" * 1000)
more = bz2.open("more.bz2", "wb"), lzma.open("more.xz", "wb")
for each in more:
    each.write(b"kept" * 1000)
archive = zipfile.ZipFile("archive.zip", "w")
archive.writestr("name", "kept")
def deep():
    local = open("local.txt", "w")
    local.write("kept in a frame")
    raise ValueError("bad batch")
print("out", end="")
deep()
"""

READS = {
    "text.txt": lambda path: path.read_text(),
    "binary.bin": lambda path: path.read_text(),
    "local.txt": lambda path: path.read_text(),
    "packed.gz": lambda path: __import__("gzip").open(path, "rt").read(),
    "more.bz2": lambda path: __import__("bz2").open(path, "rt").read(),
    "more.xz": lambda path: __import__("lzma").open(path, "rt").read(),
    "archive.zip": lambda path: __import__("zipfile").ZipFile(path).read("name").decode(),
}


@pytest.mark.parametrize("command", ["run", "plain"])
def test_an_exception_leaves_all_files_written(command: str, tmp_path: Path) -> None:
    script(tmp_path, WRITES)
    job = run(tmp_path, "script.py", **({} if command == "run" else {"command": [sys.executable]}))
    assert job.code == 1
    assert job.out == "out"
    for name, read in READS.items():
        assert read(tmp_path / name).startswith("kept"), name


LEFT = """
import allstep, torch
with allstep.init() as world:
    log = open(f"rank_{world.rank}.txt", "w")
    log.write("kept")
    if world.rank == 1:
        raise ValueError("bad batch")
    world.barrier()
"""


def test_a_rank_that_is_told_to_leave_writes_out_its_files(tmp_path: Path) -> None:
    job = run(tmp_path, "--nproc", "2", script(tmp_path, LEFT))
    assert job.code == 1
    assert [(tmp_path / f"rank_{rank}.txt").read_text() for rank in range(2)] == ["kept"] * 2
