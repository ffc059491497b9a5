"""Which run is meant: by name, by path, by a SLURM job's number."""

from __future__ import annotations

from pathlib import Path

import pytest

from allstep.errors import RunControlError
from allstep.run_control.run_search import all_runs, find_runs
from tests.run_control.records import Record, submitted


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    Record(folder, "newer", ago=10, job="48").attempt()
    Record(folder, "older", ago=99, job="47").attempt()
    submitted(folder, "waiting", "52")
    submitted(folder, "sweep", "50", array="0-1")
    Record(folder, "sweep-1", ago=5, job="50_1").attempt()
    (folder / "no-run").mkdir()
    (folder / "file").touch()
    return folder


def names(runs: Path, meant: str) -> list[str]:
    return [run.name for run in find_runs(runs, meant)]


def test_runs_are_listed_in_the_order_in_which_they_began(runs: Path) -> None:
    listed = [run.name for run in all_runs(runs)]
    assert listed[:3] == ["older", "newer", "sweep-1"]
    assert sorted(listed[3:]) == ["sweep", "waiting"]
    assert all_runs(runs / "none") == []


@pytest.mark.parametrize(
    ("meant", "found"),
    [
        ("older", ["older"]),
        ("47", ["older"]),
        ("52", ["waiting"]),
        ("50_1", ["sweep-1"]),
        ("sweep", ["sweep", "sweep-1"]),
    ],
)
def test_a_run_is_found_by_name_and_by_job(meant: str, found: list[str], runs: Path) -> None:
    assert names(runs, meant) == found


def test_an_array_s_number_is_for_all_of_its_members(runs: Path) -> None:
    assert sorted(names(runs, "50")) == ["sweep", "sweep-1"]


def test_a_run_is_found_by_the_path_of_its_folder(runs: Path, tmp_path: Path) -> None:
    assert names(tmp_path / "elsewhere", str(runs / "older")) == ["older"]


@pytest.mark.parametrize(
    ("meant", "words"), [("oldr", "did you mean older"), ("zzzz", "the last one there is"), ("99", "of job 99")]
)
def test_a_run_that_is_not_there_is_named_with_what_is(meant: str, words: str, runs: Path) -> None:
    with pytest.raises(RunControlError, match=words):
        find_runs(runs, meant)


def test_each_job_of_a_chain_is_that_run(runs: Path) -> None:
    record = Record(runs, "chain", job="60").attempt().end("preempted", 85)
    record.job = "61"
    record.attempt(1)
    assert names(runs, "60") == names(runs, "61") == ["chain"]
