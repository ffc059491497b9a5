"""Rows 1 to 5, 9 and 37 of the fault matrix: a rank raises, leaves, is killed or crashes, under each launcher."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from allstep.testing import FaultPlan
from tests.faults.rehearsal import BOUND, NEVER, STRIKES, check_first_lines, fastest, rehearsal, rehearse
from tests.jobs.job import Job
from tests.jobs.launchers import Launcher, also_under_torchrun_by_night
from tests.jobs.processes import alive, await_end, pids

pytestmark = pytest.mark.slow

AT = FaultPlan.at(rank=1, iteration=7)
RAISES = AT.raise_(ValueError("bad batch"))


@also_under_torchrun_by_night
@pytest.mark.nightly
def test_row_1_a_rank_raises_and_its_traceback_comes_first(tmp_path: Path, launcher: Launcher) -> None:
    job = rehearse(tmp_path, "train.py", fault=RAISES, launcher=launcher, within=BOUND)
    assert job.code == 1
    check_first_lines(job, "rank 1 of 2 failed first", "ValueError: bad batch", "epoch 1, iteration 7")
    check_traceback(job)
    if launcher == "allstep":
        check_cause(job)
        assert job.report["exit_code"] == 1


def check_traceback(job: Job) -> None:
    traceback = job.block.index(next(line for line in job.block if "Traceback (most recent call last)" in line))
    assert any("in train_step" in line or "in carry_out" in line for line in job.block[traceback:])


def check_cause(job: Job) -> None:
    assert (job.cause["rank"], job.cause["kind"], job.cause["iteration"]) == (1, "error", 7)
    assert job.cause["traceback"].rstrip().endswith("ValueError: bad batch")
    assert [each["rank"] for each in job.report["others"]] == [0]


@also_under_torchrun_by_night
def test_row_1_peers_in_a_collective_end_though_the_failed_rank_stays(tmp_path: Path, launcher: Launcher) -> None:
    fault = RAISES + FaultPlan.at(1, when="exit").sleep(1000)

    def once(own: Path) -> tuple[float, Job]:
        with rehearsal(own, "train.py", fault=fault, launcher=launcher) as running:
            said = running.await_line("training: rank", 2)
            (failing,) = pids(line for line in said if "rank 1," in line)
            (peer,) = pids(line for line in said if "rank 0," in line)
            watched = os.pidfd_open(peer)
            raised = running.await_line("by rank 1")[0].split("left at ")[1].split()[0]
            gone = await_end([watched], NEVER)
            outlived = alive(failing)
            job = running.end()
        assert outlived, job.text  # nothing but an order made the peer leave: its connections were all whole
        return gone - float(raised), job

    job = fastest(tmp_path, once, within=1.0)
    assert job.code != 0
    check_first_lines(job, "rank 1 of 2 failed first", "ValueError: bad batch", "epoch 1, iteration 7")
    check_traceback(job)
    if launcher == "allstep":
        check_cause(job)


@also_under_torchrun_by_night
def test_row_2_the_original_error_is_reported_from_a_rank_that_ends_slowly(tmp_path: Path, launcher: Launcher) -> None:
    job = rehearse(tmp_path, "train.py", "1000", fault=RAISES, launcher=launcher, within=BOUND)
    assert job.code != 0
    check_first_lines(job, "rank 1 of 2 failed first", "ValueError: bad batch", "iteration 7")


@pytest.mark.parametrize(
    ("launcher", "rank", "how"),
    [
        pytest.param("allstep", 0, "exit", marks=pytest.mark.nightly),
        ("allstep", 0, "return"),
        pytest.param("allstep", 1, "exit", marks=pytest.mark.nightly),
        pytest.param("allstep", 1, "return", marks=pytest.mark.nightly),
        pytest.param("torchrun", 0, "exit", marks=pytest.mark.nightly),
        pytest.param("torchrun", 0, "return", marks=pytest.mark.nightly),
        pytest.param("torchrun", 1, "return", marks=pytest.mark.nightly),
    ],
)
def test_row_3_a_rank_that_leaves_early_with_0_is_named_as_the_cause(
    tmp_path: Path, launcher: Launcher, rank: int, how: str
) -> None:
    at = FaultPlan.at(rank, 7)
    fault = at.exit(0) if how == "exit" else at.leave()
    # Errors of the others wait up to 5 s for what they follow from.
    job = rehearse(tmp_path, "train.py", fault=fault, launcher=launcher, within=BOUND + 5.0)
    assert job.code == 1
    check_first_lines(job, f"rank {rank} of 2 left first", "left early")
    if launcher == "allstep":
        assert (job.cause["rank"], job.cause["kind"]) == (rank, "left early")


@pytest.mark.parametrize(
    ("launcher", "how", "headline", "what"),
    [
        ("allstep", "exit", "rank 1 of 2 left first", "left early"),
        pytest.param("torchrun", "exit", "rank 1 of 2 left first", "left early", marks=pytest.mark.nightly),
        pytest.param("allstep", "raise", "rank 1 of 2 failed first", "KeyError: 'missing'", marks=pytest.mark.nightly),
        pytest.param("torchrun", "raise", "rank 1 of 2 failed first", "KeyError: 'missing'", marks=pytest.mark.nightly),
    ],
)
def test_a_rank_that_leaves_without_a_with_block_is_the_cause(
    tmp_path: Path, launcher: Launcher, how: str, headline: str, what: str
) -> None:
    job = rehearse(tmp_path, "without_with.py", how, launcher=launcher, within=BOUND + 5.0, since="leaving")
    assert job.code == 1
    check_first_lines(job, headline, what)


@also_under_torchrun_by_night
def test_row_4_a_rank_that_is_killed_outranks_the_errors_that_follow(tmp_path: Path, launcher: Launcher) -> None:
    job = rehearse(tmp_path, "train.py", fault=AT.kill(9), launcher=launcher, within=BOUND)
    if launcher == "allstep":
        assert job.code == 137
        check_first_lines(job, "rank 1 of 2 failed first", "SIGKILL", "epoch 1, iteration")
        assert (job.cause["rank"], job.cause["kind"], job.cause["status"]) == (1, "signal", 137)
    else:
        assert job.code != 0
        check_first_lines(job, "rank 1 of 2 failed first", "its process was killed")


@pytest.mark.parametrize(
    ("crash", "code", "name"),
    [
        pytest.param(AT.segfault(), 139, "SIGSEGV", id="segfault"),
        pytest.param(AT.abort(), 134, "SIGABRT", id="abort", marks=pytest.mark.nightly),
    ],
)
def test_row_5_a_crash_is_named_with_its_signal_and_stack(
    tmp_path: Path, crash: FaultPlan, code: int, name: str
) -> None:
    job = rehearse(tmp_path, "train.py", fault=crash, within=BOUND)
    assert job.code == code
    check_first_lines(job, "rank 1 of 2 failed first", name, "Fatal Python error")
    assert any("in carry_out" in line for line in job.block)
    assert (job.cause["rank"], job.cause["kind"]) == (1, "signal")


@also_under_torchrun_by_night
def test_row_9_of_ranks_that_fail_together_all_are_listed_in_order(tmp_path: Path, launcher: Launcher) -> None:
    errors = ["ValueError: mine", "KeyError: 'also mine'"]
    plan = FaultPlan.at(0, 7).raise_(ValueError("mine")) + AT.raise_(KeyError("also mine"))
    job = rehearse(tmp_path, "train.py", fault=plan, launcher=launcher, within=BOUND)
    assert job.code == 1
    first = int("rank 1 of 2" in job.block[0])
    check_first_lines(job, f"rank {first} of 2 failed first", errors[first])
    assert f"rank {1 - first} failed too: {errors[1 - first]}" in "\n".join(job.block)
    if launcher == "allstep":
        assert job.cause["rank"] == first
        assert [(each["rank"], each["kind"]) for each in job.report["others"]] == [(1 - first, "error")]
        assert job.cause["order"] < job.report["others"][0]["order"]


@also_under_torchrun_by_night
def test_row_37_an_error_in_a_data_loaders_worker_is_the_ranks(tmp_path: Path, launcher: Launcher) -> None:
    fault = FaultPlan.at(1, 5, when="data").raise_(ValueError("item 5 is broken"))
    job = rehearse(tmp_path, "loads.py", fault=fault, launcher=launcher, within=BOUND)
    live = [line for line in job.lines if STRIKES in line and not line.startswith(" ")]  # not those of the report
    assert len(live) == 1
    assert job.code == 1
    check_first_lines(job, "rank 1 of 2 failed first", "ValueError", "section data")
    block = "\n".join(job.block)
    assert "Caught ValueError in DataLoader worker process 0" in block
    assert "in __getitem__" in block
    assert "item 5 is broken" in block
    if launcher == "allstep":
        assert (job.cause["rank"], job.cause["section"], job.cause["iteration"]) == (1, "data", 2)


def test_a_rank_that_nccl_aborted_is_not_the_first_cause(tmp_path: Path) -> None:
    job = rehearse(tmp_path, "aborted_by_nccl.py")
    check_first_lines(job, "rank 0 of 2 failed first", "exit code 1")
    assert job.code == 1
    assert any("ValueError: the batch that rank 1 waited for" in line for line in job.block)
    (other,) = job.report["others"]
    assert (other["rank"], other["kind"], other["status"]) == (1, "derived", 134)
