"""Rows 1 to 5, 9 and 37 of the fault matrix: a rank raises, leaves, is killed or crashes."""

from __future__ import annotations

from pathlib import Path

import pytest

from allstep.testing import FaultPlan
from tests.faults.jobs import BOUND, STRIKES, Launcher, rehearse
from tests.faults.reading import check_first_lines

pytestmark = pytest.mark.slow

LAUNCHERS: list[Launcher] = ["allstep", "torchrun"]

AT = FaultPlan.at(rank=1, iteration=7)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_row_1_a_rank_raises_and_its_traceback_comes_first(tmp_path: Path, launcher: Launcher) -> None:
    job = rehearse(tmp_path, "train.py", fault=AT.raise_(ValueError("bad batch")), launcher=launcher)
    assert job.since(STRIKES) < job.bound()
    assert job.code == 1
    check_first_lines(job, "rank 1 of 2 failed first", "ValueError: bad batch", "epoch 1, iteration 7")
    if launcher == "allstep":
        assert (job.cause["rank"], job.cause["kind"], job.cause["iteration"]) == (1, "error", 7)
        assert job.cause["traceback"].rstrip().endswith("ValueError: bad batch")
        assert [each["rank"] for each in job.report["others"]] == [0]
        assert job.report["exit_code"] == 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_row_2_the_original_error_is_reported_however_slowly_the_rank_cleans_up(
    tmp_path: Path, launcher: Launcher
) -> None:
    job = rehearse(tmp_path, "train.py", "20", fault=AT.raise_(ValueError("bad batch")), launcher=launcher)
    assert job.since(STRIKES) < job.bound()
    assert job.code != 0
    check_first_lines(job, "rank 1 of 2 failed first", "ValueError: bad batch", "iteration 7")


@pytest.mark.parametrize("leaves", [AT.exit(0), AT.leave()], ids=["exit", "return"])
def test_row_3_a_rank_that_leaves_early_with_0_is_named_as_the_cause(tmp_path: Path, leaves: FaultPlan) -> None:
    job = rehearse(tmp_path, "train.py", fault=leaves)
    assert job.since(STRIKES) < job.bound(BOUND + 5.0)  # errors of the others wait for what they follow from
    assert job.code == 1
    check_first_lines(job, "rank 1 of 2 left first", "left early")
    assert (job.cause["rank"], job.cause["kind"]) == (1, "left early")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_row_4_a_rank_that_is_killed_outranks_the_errors_that_follow(tmp_path: Path, launcher: Launcher) -> None:
    job = rehearse(tmp_path, "train.py", fault=AT.kill(9), launcher=launcher)
    assert job.since(STRIKES) < job.bound()
    if launcher == "allstep":
        assert job.code == 137
        check_first_lines(job, "rank 1 of 2 failed first", "SIGKILL", "epoch 1, iteration")
        assert (job.cause["rank"], job.cause["kind"], job.cause["status"]) == (1, "signal", 137)
    else:
        assert job.code != 0
        check_first_lines(job, "rank 1 of 2 failed first", "its process was killed")


@pytest.mark.parametrize(
    ("crash", "code", "name"),
    [(AT.segfault(), 139, "SIGSEGV"), (AT.abort(), 134, "SIGABRT")],
    ids=["segfault", "abort"],
)
def test_row_5_a_crash_is_named_with_its_signal_and_stack(
    tmp_path: Path, crash: FaultPlan, code: int, name: str
) -> None:
    job = rehearse(tmp_path, "train.py", fault=crash)
    assert job.since(STRIKES) < job.bound()
    assert job.code == code
    check_first_lines(job, "rank 1 of 2 failed first", name, "Fatal Python error")
    assert "in train_step" in job.text or "acts.py" in job.text
    assert (job.cause["rank"], job.cause["kind"]) == (1, "signal")


def test_row_9_of_ranks_that_fail_together_all_are_listed_in_order(tmp_path: Path) -> None:
    plan = FaultPlan.at(0, 7).raise_(ValueError("mine")) + AT.raise_(KeyError("also mine"))
    job = rehearse(tmp_path, "train.py", fault=plan)
    assert job.since(STRIKES) < job.bound()
    assert job.code == 1
    first = job.cause["rank"]
    check_first_lines(job, f"rank {first} of 2 failed first", ["ValueError: mine", "KeyError: 'also mine'"][first])
    assert f"rank {1 - first} failed too: {['ValueError: mine', 'KeyError'][1 - first]}" in job.text
    assert [(each["rank"], each["kind"]) for each in job.report["others"]] == [(1 - first, "error")]


def test_row_37_an_error_in_a_data_loaders_worker_is_the_ranks(tmp_path: Path) -> None:
    job = rehearse(tmp_path, "loads.py")
    assert job.since("item 5 is broken") < job.bound()
    assert job.code == 1
    check_first_lines(job, "rank 1 of 2 failed first", "ValueError")
    assert "item 5 is broken" in job.cause["traceback"]
    assert job.cause["section"] == "data"
