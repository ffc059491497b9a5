"""`run_ranks` gives back what real ranks return, names the one that failed, and leaves no process behind."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

import pytest

from allstep import Engine
from allstep.testing import FaultPlan, RanksError, run_ranks
from allstep.world import World
from allstep.world.bounded_store import poll
from allstep.world.process_group import forget_groups
from tests.jobs.processes import alive

pytestmark = pytest.mark.slow


def placed(world: World, factor: int) -> tuple[int, int, int]:
    return world.rank * factor, world.world_size, world.all_reduce(world.rank)


def raises_on_rank_one(world: World) -> None:
    if world.rank == 1:
        raise KeyError("the true cause")
    world.barrier()


def dies_on_rank_one(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def tells_its_pid_and_waits(world: World, folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    if world.rank == 1:
        signal.pause()


def test_results_come_in_rank_order() -> None:
    assert run_ranks(placed, 3, 10) == [(0, 3, 3), (10, 3, 3), (20, 3, 3)]


def test_the_rank_that_raised_is_named_with_its_traceback_and_exception() -> None:
    with pytest.raises(RanksError, match=r"(?s)rank 1 of 2 raised.*raises_on_rank_one.*the true cause") as caught:
        run_ranks(raises_on_rank_one, 2)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_rank_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(RanksError, match="rank 1 of 2 died with exit code -9"):
        run_ranks(dies_on_rank_one, 2)


def segfaults_on_rank_one(world: World) -> None:
    if world.rank == 1:
        ctypes.string_at(0)
    world.barrier()


def test_a_rank_that_crashes_is_named_with_its_stack() -> None:
    with pytest.raises(RanksError, match=r"(?s)rank 1 of 2 died .*SIGSEGV.*Segmentation fault.*segfaults_on_rank_one"):
        run_ranks(segfaults_on_rank_one, 2)


def notices_first(world: World, done: Path) -> None:
    if world.rank == 1:
        try:
            raise ValueError("the true cause")
        finally:
            forget_groups(abort=False)
            poll(done.exists, time.monotonic() + 30)
            time.sleep(0.5)  # the true cause is told last
    try:
        world.barrier()
    finally:
        done.touch()


def test_an_error_about_a_lost_connection_waits_for_its_cause(tmp_path: Path) -> None:
    with pytest.raises(RanksError, match=r"(?s)rank 1 of 2 raised.*the true cause") as caught:
        run_ranks(notices_first, 2, tmp_path / "done")
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_fault_can_be_rehearsed_in_ranks() -> None:
    with pytest.raises(RanksError, match=r"rank 1 of 2 died with exit code -9"):
        run_ranks(trains, 2, fault=FaultPlan.at(rank=1, iteration=3).kill(9))
    assert run_ranks(trains, 2) == [5, 5]


def trains(world: World) -> int:
    return Engine(lambda engine, batch: world.all_reduce(1)).run(range(5)).iteration


def test_ranks_that_do_not_finish_are_named_with_where_they_stand(tmp_path: Path) -> None:
    with pytest.raises(
        RanksError, match=r"(?s)ranks \[0, 1\] of 2 did not finish in 5.*rank 1 is at:.*tells_its_pid_and_waits"
    ):  # rank 0 waits for rank 1 to leave
        run_ranks(tells_its_pid_and_waits, 2, tmp_path, timeout=5.0)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(map(alive, pids))


@pytest.mark.parametrize("world_size", [0, -1])
def test_a_world_of_nobody_is_refused(world_size: int) -> None:
    with pytest.raises(ValueError, match="world_size"):
        run_ranks(placed, world_size, 1)


def returns_what_cannot_be_sent(world: World) -> object:
    return lambda: world.rank


def test_a_result_that_cannot_be_pickled_is_an_error_that_says_so() -> None:
    with pytest.raises(RanksError, match=r"(?is)of 2 raised:.*pickle"):
        run_ranks(returns_what_cannot_be_sent, 2)


def returns_early(world: World) -> None:
    if world.rank == 0:
        world.barrier()


def test_a_rank_that_returns_while_others_need_it_is_named() -> None:
    with pytest.raises(RanksError, match=r"rank 1 of 2 left first") as caught:
        run_ranks(returns_early, 2)
    assert "left early" in str(caught.value)
