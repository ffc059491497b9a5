"""A run that was killed anywhere and resumed has the parameters of an unbroken one, to the last bit."""

from __future__ import annotations

import gc
import multiprocessing

import pytest

from allstep.testing import run_ranks
from tests.checkpoint.training import Job, Run, folder_for
from tests.regression import same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def unequal_after_kills(world, job, kills):
    """At which of `kills` a resumed run parts from the unbroken one, and where each resumed run began."""
    multiprocessing.current_process()._config["daemon"] = False  # a rank of a test may have DataLoader workers too
    unbroken = Run(world, folder_for(job, "unbroken")).go()
    parted, began = [], []
    for kill in kills:
        gc.collect()  # the killed run's DataLoader workers would have ended with it
        each = folder_for(job, f"killed-{kill}")
        Run(world, each, kill_at=kill).go()
        resumed = Run(world, each).go()
        began.append(resumed.taken[0][1] if resumed.taken else None)
        same_data = resumed.taken == [entry for entry in unbroken.taken if entry[1] >= (began[-1] or 1 << 30)]
        if not same(unbroken.weights(), resumed.weights()) or not same_data:
            parted.append(kill)
    return parted, began


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.nightly), 2, pytest.param(3, marks=pytest.mark.nightly)]
)
def test_killed_at_every_iteration(tmp_path, ranks):
    kills = range(1, 16) if ranks == 1 else range(1, 16, ranks)
    for parted, began in run_ranks(unequal_after_kills, ranks, Job(str(tmp_path)), list(kills), timeout=280):
        assert parted == []
        assert began == [(kill - 1) // 2 * 2 + 1 for kill in kills]


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.nightly), 2, pytest.param(3, marks=pytest.mark.nightly)]
)
def test_killed_with_workers_and_accumulation(tmp_path, ranks):
    job = Job(str(tmp_path), workers=2, accumulate=2, every=3)
    for parted, _ in run_ranks(unequal_after_kills, ranks, job, [4, 8] if ranks == 1 else [8], timeout=280):
        assert parted == []


@pytest.mark.parametrize(
    ("ranks", "kills"),
    [(2, [16]), *(pytest.param(ranks, [7, 16, 23], marks=pytest.mark.nightly) for ranks in (1, 2))],
)
def test_killed_with_a_global_batch_in_micro_batches(tmp_path, ranks, kills):
    job = Job(str(tmp_path), most=2, every=2)
    for parted, _ in run_ranks(unequal_after_kills, ranks, job, kills, timeout=280):
        assert parted == []
