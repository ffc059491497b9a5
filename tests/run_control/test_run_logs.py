"""What ranks printed, as it comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from allstep.errors import RunControlError
from allstep.run_control.run_logs import RunLogs
from allstep.run_control.run_search import read_run
from tests.run_control.records import Record, submitted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record = Record(tmp_path, "r").attempt()
    for attempt in (0, 1):
        for rank in (0, 1, 10, 2):
            write(record.folder, attempt, rank, f"{attempt}.{rank} a\n{attempt}.{rank} b\n")
    return record.folder


def write(folder: Path, attempt: int, rank: int, text: str) -> None:
    path = folder / f"attempt_{attempt}" / f"rank_{rank}.log"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def read(logs: RunLogs, most: int | None = None) -> list[str]:
    return [line for _, lines in logs.read(most) for line in lines]


def test_attempts_and_ranks_come_in_the_order_of_their_numbers(folder: Path) -> None:
    order = [(file.attempt, file.rank) for file, _ in RunLogs(folder).read()]
    assert order == [(attempt, rank) for attempt in (0, 1) for rank in (0, 1, 2, 10)]


def test_one_rank_is_read_across_attempts_and_further_on(folder: Path) -> None:
    logs = RunLogs(folder, rank=2)
    assert read(logs) == ["0.2 a", "0.2 b", "1.2 a", "1.2 b"]
    write(folder, 1, 2, "more\nhal")
    write(folder, 1, 1, "not this rank\n")
    assert read(logs) == ["more"]
    write(folder, 1, 2, "f\n")
    write(folder, 2, 2, "next attempt\nunended")
    assert read(logs) == ["half", "next attempt"]
    assert [lines for _, lines in logs.rest()] == [["unended"]]
    assert read(logs) == []


def test_the_last_lines_are_of_what_was_there_and_not_of_what_comes(folder: Path) -> None:
    logs = RunLogs(folder, rank=0)
    assert read(logs, 1) == ["0.0 b", "1.0 b"]
    write(folder, 1, 0, "c\nd\ne\n")
    assert read(logs, 1) == ["c", "d", "e"]


def test_bytes_that_are_no_text_are_shown_all_the_same(folder: Path) -> None:
    (folder / "attempt_0" / "rank_0.log").write_bytes(b"\xff\xfe ok\n")
    assert "ok" in read(RunLogs(folder, rank=0))[0]


def test_a_job_without_logs_of_ranks_has_its_own(tmp_path: Path) -> None:
    folder = submitted(tmp_path, "r", "47")
    (folder / "slurm-47.log").write_text("srun: error\n")
    assert read(RunLogs(folder)) == ["srun: error"]
    run = read_run(folder)
    assert run is not None
    with pytest.raises(RunControlError, match="leave out --rank"):
        RunLogs(folder, rank=0).check(run, will_come=False)


def test_a_rank_that_is_not_there_is_named_with_those_that_are(folder: Path) -> None:
    run = read_run(folder)
    assert run is not None
    with pytest.raises(RunControlError, match=r"no log of rank 7; it has those of ranks \[0, 1, 2, 10\]"):
        RunLogs(folder, rank=7).check(run, will_come=False)


def test_where_another_launcher_has_the_output_is_said(tmp_path: Path) -> None:
    record = Record(tmp_path, "r", launcher="torchrun").attempt()
    run = read_run(record.folder)
    assert run is not None
    with pytest.raises(RunControlError, match="torchrun has it"):
        RunLogs(record.folder).check(run, will_come=True)
