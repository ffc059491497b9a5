"""Real scripts, interrupted by real signals, over real processes; right ones and those that are wrong in one way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from allstep.cli.main import main
from allstep.errors import RehearsalError
from allstep.testing import RehearsalReport, rehearse
from tests.testing.test_plugin import run_pytest

TRAIN = Path(__file__).parent / "scripts" / "train.py"
QUICK = {"iterations": 16, "at": 6, "lead": 20.0, "kill_wait": 20.0, "timeout": 80.0}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def rehearsed(folder: Path, kind: Any, *arguments: str, **options: Any) -> RehearsalReport:
    """The report, good or not."""
    try:
        return rehearse(kind, TRAIN, *arguments, **{**QUICK, "runs": folder, "workdir": folder, **options})
    except RehearsalError as error:
        return cast(RehearsalReport, error.report)


def test_a_preempted_script_is_exact_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--iterations", "16", "--at", "6", "--lead", "20", "--runs", str(tmp_path), "--workdir", str(tmp_path)]
    assert main(["rehearse", "preemption", *quick, "--json", str(TRAIN)]) == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    first, second = report["starts"]
    assert report["verdict"] == "exact"
    assert report["causes"] == []
    assert first["code"] == 85
    assert 6 <= first["saved"] == first["reached"] == second["began_at"]
    assert second["reached"] == report["iterations"] == first["saved"] + 10
    # Weights, their moments, and the number of steps of each parameter.
    assert report["comparison"]["tensors"] == 4 * 4
    assert report["comparison"]["differences"] == []
    assert list(tmp_path.iterdir()) == []
    assert "interrupted after iteration 6" in told.err


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["preemption", "requeue", "failure", "time-limit"])
def test_a_right_script_is_exact_whatever_happens(kind: str, ranks: int, tmp_path: Path) -> None:
    report = rehearsed(tmp_path, kind, "--every", "4", ranks=ranks)
    assert (report.verdict, report.causes) == ("exact", ()), str(report)
    if kind == "failure":
        assert report.starts[0].code == 137
        assert report.starts[1].began_at == 4
    else:
        assert report.starts[0].code == 85


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["preemption", "failure"])
@pytest.mark.parametrize(("ranks", "then"), [(2, 3), (2, 1), (1, 2)])
def test_at_another_size_a_right_script_is_close(kind: str, ranks: int, then: int, tmp_path: Path) -> None:
    arguments = ("--wrong", "per-size", "--every", "3")
    report = rehearsed(tmp_path, kind, *arguments, ranks=ranks, then_ranks=then)
    assert report.verdict in ("exact", "close"), str(report)
    assert [each.ranks for each in report.starts] == [ranks, then]


@pytest.mark.nightly
def test_at_another_size_other_samples_are_named(tmp_path: Path) -> None:
    report = rehearsed(tmp_path, "preemption", "--wrong", "per-size", "--per-rank", then_ranks=1)
    assert report.verdict == "differs", str(report)
    assert "global_batch_size" in report.causes[0]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kind", "arguments", "verdict", "said"),
    [
        ("preemption", ["--wrong", "no-checkpoint"], "began anew", "makes no Checkpoint"),
        ("preemption", ["--wrong", "no-resume"], "began anew", "call checkpoint.resume()"),
        ("preemption", ["--wrong", "moves"], "began anew", "each start saves to another folder"),
        ("time-limit", ["--wrong", "no-preemption"], "began anew", "attach allstep.Preemption"),
        ("failure", [], "began anew", "a failure comes without a notice, so save more often"),
        ("requeue", ["--wrong", "optimizer"], "differs", "the optimizer's state (its moments) is not what it was"),
        ("preemption", ["--wrong", "scheduler"], "differs", "a scheduler is not where it was"),
        ("preemption", ["--wrong", "generator"], "differs", "a generator of the script's own"),
        ("preemption", ["--wrong", "weights"], "differs", "the weights are not those that were saved"),
        ("preemption", ["--wrong", "rate"], "differs", "the optimizer's options (such as its learning rate)"),
        ("preemption", ["--wrong", "counts"], "differs", "the order of data is not the sampler's"),
        ("preemption", ["--wrong", "unseeded"], "differs", "begin with different weights: seed it"),
        ("preemption", ["--wrong", "chance"], "differs", "the script is not the same twice"),
        ("preemption", ["--wrong", "crash"], "failed", ""),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value[1:]) or "seldom",
)
def test_what_is_wrong_with_a_script_is_named(
    kind: str, arguments: list[str], verdict: str, said: str, tmp_path: Path
) -> None:
    report = rehearsed(tmp_path, kind, *arguments)
    assert report.verdict == verdict, str(report)
    assert said in " ".join(report.causes), str(report)
    assert bool(report.causes) == bool(said)
    if verdict == "failed":
        assert "not a second time" in report.output


@pytest.mark.nightly
def test_a_generator_that_is_kept_is_exact(tmp_path: Path) -> None:
    report = rehearsed(tmp_path, "preemption", "--wrong", "generator-kept")
    assert report.verdict == "exact", str(report)


@pytest.mark.nightly
def test_iterations_that_are_lost_are_noted_though_the_end_is_exact(tmp_path: Path) -> None:
    report = rehearsed(tmp_path, "time-limit", "--wrong", "no-preemption", "--every", "4")
    assert report.verdict == "exact", str(report)
    assert "iterations were lost" in " ".join(report.notes)


@pytest.mark.nightly
def test_a_job_that_does_not_stop_is_not_requeued(tmp_path: Path) -> None:
    report = rehearsed(tmp_path, "requeue", "--wrong", "no-preemption", "--every", "100000", lead=2.0)
    assert report.verdict == "failed", str(report)
    assert "takes this end (exit code 143) for a failure" in " ".join(report.notes)


@pytest.mark.nightly
def test_a_script_that_is_done_too_soon_is_told_so(tmp_path: Path) -> None:
    assert rehearsed(tmp_path, "preemption", "--epochs", "1", at=15).verdict == "finished early"


@pytest.mark.nightly
def test_a_script_that_fails_by_itself_shows_its_last_words(tmp_path: Path) -> None:
    report = rehearsed(tmp_path, "preemption", "--every", "never")
    assert report.verdict == "failed"
    assert "ArgumentError" in report.output


@pytest.mark.nightly
def test_the_fixture_fails_a_test_with_the_report(tmp_path: Path) -> None:
    tests = f"""
import pytest
from allstep.testing import RehearsalError

def test_goes_on(rehearse):
    assert rehearse("failure", {str(TRAIN)!r}, "--every", "2", iterations=8).verdict == "exact"

def test_begins_anew(rehearse, tmp_path):
    rehearse("failure", {str(TRAIN)!r}, "--wrong", "no-resume", "--every", "2", iterations=8)
"""
    ended = run_pytest(tmp_path, tests=tests)
    assert "1 passed" in ended.stdout, ended.stdout
    assert "1 failed" in ended.stdout
    assert "RehearsalError: rehearsal of failure:" in ended.stdout
    assert "began anew: the run did not go on" in ended.stdout
    assert "was saved, and the second start began behind iteration 0" in ended.stdout
