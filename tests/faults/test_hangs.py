"""Rows 6 to 8, 19, 24 and 35 of the fault matrix: ranks that make no progress, or too little of it."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.flight_recorder.components.loader import read_dir

from allstep.testing import FaultPlan
from tests.faults.rehearsal import SCRIPTS, check_first_lines, rehearse
from tests.jobs.job import Job
from tests.jobs.launchers import Launcher, also_under_torchrun_by_night

pytestmark = pytest.mark.slow

LIMITS = "step=3,handler=3,evaluation=3,data=3,silence=3"
FOUND = 10.0
"""Seconds from the fault to the end: the limit, and what is done when it has passed; less than any default limit."""

AT = FaultPlan.at(rank=1, iteration=7)


def loaded_records(job: Job) -> dict[str, Any]:
    """The records of an attempt's ranks as `torchfrtrace` loads them."""
    (folder,) = job.folder.glob("runs/*/attempt_0")
    try:
        details, _ = read_dir(SimpleNamespace(trace_dir=str(folder), prefix="flight_recorder_rank_"))
    finally:
        gc.enable()  # which `read_dir` turns off
    return details


@also_under_torchrun_by_night
def test_row_6_a_rank_that_hangs_is_named_with_its_stack_and_last_progress(tmp_path: Path, launcher: Launcher) -> None:
    job = rehearse(
        tmp_path, "train.py", fault=AT.sleep(1000), launcher=launcher, env={"ALLSTEP_LIMITS": LIMITS}, within=FOUND
    )
    check_first_lines(job, "rank 1 of 2 made no progress", "epoch 1, iteration 7", "section step")
    assert "inject.py" in job.text[job.text.index("made no progress") :]  # where it sleeps
    if launcher == "allstep":
        assert job.code == 83
        assert (job.cause["rank"], job.cause["kind"], job.cause["iteration"]) == (1, "hang", 7)
        assert "carry_out" in job.cause["stacks"]
        (other,) = job.report["others"]
        assert other["rank"] == 0
        assert "all_reduce" in other["waiting"]
        # torch's record of collectives: compared over ranks, and left for its own analyser.
        assert re.search(
            r"rank 0 issued gloo:all_gather .*#7 of group default_pg, and rank 1 did not", job.report["explanation"]
        )
        records = loaded_records(job)
        assert {(name, found["rank"]) for name, found in records.items()} == {
            (f"flight_recorder_rank_{rank}", rank) for rank in range(2)
        }


@pytest.mark.nightly
def test_row_6_a_source_of_data_that_blocks_is_named_as_such(tmp_path: Path) -> None:
    fault = FaultPlan.at(1, 7, when="data").sleep(1000)
    job = rehearse(tmp_path, "train.py", fault=fault, options=["--limits", LIMITS], within=FOUND)
    assert job.code == 83
    check_first_lines(job, "rank 1 of 2 made no progress", "section data")


@pytest.mark.nightly
def test_row_6_a_rank_that_hangs_after_its_last_run_is_named(tmp_path: Path) -> None:
    fault = FaultPlan.at(1, when="exit").sleep(1000)
    options = ["--limits", f"{LIMITS},idle=3"]
    job = rehearse(tmp_path, "reduces.py", "5", fault=fault, options=options, within=FOUND)
    assert job.out.count("trained 5") == 2
    assert job.code == 83
    check_first_lines(job, "rank 1 of 2 made no progress", "section idle")
    assert (job.cause["rank"], job.cause["kind"], job.cause["section"]) == (1, "hang", "idle")
    assert "carry_out" in job.cause["stacks"]
    (other,) = job.report["others"]
    assert "close" in other["waiting"]


def test_row_7_a_frozen_rank_is_found_and_ended_by_force(tmp_path: Path) -> None:
    job = rehearse(tmp_path, "train.py", fault=AT.freeze(), options=["--limits", LIMITS], within=FOUND)
    assert job.code == 83
    check_first_lines(job, "rank 1 of 2 made no progress")
    assert (job.cause["rank"], job.cause["kind"]) == (1, "hang")


def test_row_8_a_rank_that_holds_the_interpreter_lock_still_shows_its_stack(tmp_path: Path) -> None:
    job = rehearse(tmp_path, "train.py", fault=AT.hold_gil(1000), options=["--limits", LIMITS], within=FOUND)
    assert job.code == 83
    check_first_lines(job, "rank 1 of 2 made no progress")
    assert "_sleep_with_lock" in job.cause["stacks"]


@pytest.mark.parametrize("how", ["computes", "sleeps"])
@also_under_torchrun_by_night
@pytest.mark.nightly
def test_a_call_that_holds_the_interpreter_lock_may_last_where_no_limit_is(
    how: str, tmp_path: Path, launcher: Launcher
) -> None:
    env = {"ALLSTEP_LIMITS": "silence=2"}
    job = rehearse(tmp_path, "holds_the_lock.py", how, "7", launcher=launcher, env=env)
    assert job.code == 0, job.text
    assert job.text.count("trained on") == 2


@also_under_torchrun_by_night
def test_row_19_a_frozen_store_holds_up_nobody_longer_than_the_limit(tmp_path: Path, launcher: Launcher) -> None:
    fault = FaultPlan.at(0, 7).freeze()
    job = rehearse(tmp_path, "train.py", fault=fault, launcher=launcher, env={"ALLSTEP_LIMITS": LIMITS}, within=FOUND)
    assert job.code != 0
    check_first_lines(job, "rank 0 of 2 made no progress")


@also_under_torchrun_by_night
def test_row_24_a_slow_rank_is_named_and_not_ended(tmp_path: Path, launcher: Launcher) -> None:
    job = rehearse(tmp_path, "few_steps.py", "40", fault=FaultPlan.at(1, 2).slow(0.1), launcher=launcher)
    assert job.code == 0, job.text
    assert job.text.count("trained 40") == 2
    assert "rank 1 is slow" in job.text
    assert job.report == {}


def test_row_35_a_rank_alone_in_a_collective_is_named_as_a_divergence(tmp_path: Path) -> None:
    script = "alone_in_a_collective.py"
    lines = (SCRIPTS / script).read_text().splitlines()
    line = 1 + next(n for n, text in enumerate(lines) if "world.all_reduce" in text)
    job = rehearse(tmp_path, script, options=["--limits", LIMITS], within=FOUND, since="rank 0 goes alone")
    assert job.code == 83
    explanation = job.report["explanation"]
    assert re.search(rf"rank 0 waits in all_reduce #\d+ at {script}:{line} \(engine 'trainer'\)", explanation)
    assert "rank 1 waits in agreement (engine 'trainer')" in explanation
    assert explanation in "\n".join(job.block)
    ranks = {each["rank"]: each for each in (job.cause, *job.report["others"])}
    assert job.cause["kind"] == "hang"
    assert "in evaluates" in ranks[0]["stacks"]
    assert "in evaluates" not in ranks[1]["stacks"]
    assert ranks[0]["section"] == "handler"
