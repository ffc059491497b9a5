"""`allstep status` and `allstep history`: what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from allstep.cli.main import main
from tests.run_control.records import ELSEWHERE, Record


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    Record(folder, "first", ago=9000).attempt().progress(50).save(40).end()
    second = Record(folder, "second", ago=5000).attempt().progress(10).fail()
    second.now += 600
    second.attempt(1).progress(20).fail("rank 0: ValueError: bad batch").end("failed", 1, attempt=False)
    Record(folder, "third", ago=100, process=ELSEWHERE).attempt().progress(25, goal=100, rate=0.5).save(20)
    return folder


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[str]]:
    code = main(list(argv))
    return code, capsys.readouterr().out.splitlines()


def test_all_that_is_known_of_one_run_is_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = said(capsys, "status", "--runs", str(runs), "third")
    assert code == 0
    assert lines[0] == f"run       third, in {runs}/third"
    assert lines[1:3] == ["state     running", "nodes     node7"]
    assert lines[3].startswith("attempt   0, of 2 ranks, 1 min ")
    assert lines[4] == "progress  epoch 2, iteration 25 of 100 (25.0%), 2 s each"
    assert lines[5] == "time      2 min 30 s left at this rate"
    assert lines[6].startswith("saved     iteration 20, 1 min 4")
    assert lines[6].endswith("ago, in 0.5 s: /c/save-20")


def test_without_a_name_it_is_about_what_is_not_over(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "status", "--runs", str(runs))[1][0].startswith("run       third")
    Record(runs, "fourth", ago=10, process=ELSEWHERE).attempt().progress(3)
    _, (heading, *rows) = said(capsys, "status", "--runs", str(runs))
    assert heading.split()[:3] == ["RUN", "STATE", "NODES"]
    assert [row.split()[:2] for row in rows] == [["third", "running"], ["fourth", "running"]]
    assert rows[0].split()[4:8] == ["2", "25/100", "2", "s"]


def test_where_all_is_over_it_is_about_the_last_one(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Record(runs, "last", ago=10).attempt().end()
    (runs / "third" / "run.json").unlink()
    assert said(capsys, "status", "--runs", str(runs))[1][0].startswith("run       last")
    assert said(capsys, "status", "--runs", str(runs / "none"))[1] == [f"no run in {runs}/none"]


def test_as_json_it_is_a_list_with_everything(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (status,) = json.loads("\n".join(said(capsys, "status", "--runs", str(runs), "--json", "second")[1]))
    assert (status["state"], status["attempt"], status["attempts"], status["iteration"]) == ("failed", 1, 2, 20)
    assert status["failure"]["what"] == "rank 0: ValueError: bad batch"


def test_a_first_cause_is_in_the_details_with_its_report(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines = said(capsys, "status", "--runs", str(runs), "second")
    (failed,) = [line for line in lines if line.startswith("failed")]
    assert "attempt 1" in failed
    assert failed.endswith("ago: rank 0: ValueError: bad batch; see /r/failure.json")


def test_a_run_that_is_not_there_is_one_line_and_exit_code_2(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--runs", str(runs), "secnod"]) == 2
    assert "did you mean second" in capsys.readouterr().err


def test_history_lists_runs_and_how_they_ended(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (heading, *rows) = said(capsys, "history", "--runs", str(runs))
    assert heading.split()[0] == "RUN"
    assert [row.split()[0] for row in rows] == ["first", "second", "third"]
    assert "finished" in rows[0]
    assert "10 min 0 s" in rows[1]
    assert rows[1].endswith("failed    rank 0: ValueError: bad batch")
    assert [row.split()[0] for row in said(capsys, "history", "--runs", str(runs), "-n", "1")[1][1:]] == ["third"]


def test_history_of_a_run_lists_its_attempts(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (_, first, second) = said(capsys, "history", "--runs", str(runs), "second")
    assert first.split()[0] == "0"
    assert first.endswith("failed   rank 1: killed by SIGKILL")
    assert second.endswith("failed   rank 0: ValueError: bad batch")
    found = json.loads("\n".join(said(capsys, "history", "--runs", str(runs), "--json", "second")[1]))
    assert [(each["attempt"], each["outcome"]) for each in found] == [(0, "failed"), (1, "failed")]
