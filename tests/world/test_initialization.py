"""Opening and ending a World over real ranks: adopted groups, several Worlds in a row, failures."""

from __future__ import annotations

import os
import re
import time

import pytest
import torch
import torch.distributed as dist

import allstep
from allstep.errors import WorldError
from allstep.testing import RanksError, run_ranks
from allstep.world.bounded_store import poll
from tests.world.test_world_main_first import in_order

PLACE = re.compile("RANK|WORLD_SIZE|MASTER|TORCHELASTIC|ALLSTEP|GROUP|ROLE|LOCAL")


def the_users_own_group(rank: int, world_size: int, path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)


def forget_the_launcher() -> None:
    for name in list(os.environ):
        if PLACE.match(name):
            del os.environ[name]


def facts(world):
    return world.rank, world.world_size, world.local_rank, world.local_world_size, world.node_rank, world.backend


def adopt(world, path, keep_environment: bool):
    rank, world_size = world.rank, world.world_size
    world.close()
    if not keep_environment:
        forget_the_launcher()
    the_users_own_group(rank, world_size, path)
    seen = []
    for number in range(2):
        folder = path.parent / f"turn-{number}"
        folder.mkdir(exist_ok=True)
        with allstep.init() as adopted:
            early, order = in_order(adopted, folder)
            seen.append((facts(adopted), adopted.all_reduce(rank + 1), early, 0 in order))
    seen.append(dist.is_initialized())
    total = torch.tensor([1])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return [*seen, total.item()]


@pytest.mark.parametrize("keep_environment", [True, False])
def test_the_users_own_group_is_used_and_left_alone(tmp_path, keep_environment):
    results = run_ranks(adopt, 2, tmp_path / "store", keep_environment)
    for rank, (first, second, still_there, total) in enumerate(results):
        assert first == second == ((rank, 2, rank, 2, 0, "gloo"), 3, False, True)
        assert (still_there, total) == (True, 2)


def adopt_another_backend(world, path):
    rank = world.rank
    world.close()
    the_users_own_group(rank, 1, path)
    try:
        allstep.init(backend="nccl")
    except WorldError as error:
        return str(error), dist.is_initialized()


def test_another_backend_than_the_users_group_has_is_refused(tmp_path):
    ((message, initialised),) = run_ranks(adopt_another_backend, 1, tmp_path / "store")
    assert "backend is 'nccl', but torch.distributed is initialised already, with gloo" in message
    assert initialised


def several_worlds(world):
    world.close()
    models, seen = [], []
    for number in range(3):
        with allstep.init() as again:
            models.append(again.wrap(torch.nn.Linear(2, 2)))  # a model outlives its World and holds its group
            with again.main_first():
                pass
            seen.append(again.all_reduce(number))
        seen.append(dist.is_initialized())
    return seen


def test_one_process_can_open_worlds_in_a_row():
    assert run_ranks(several_worlds, 2) == [[0, False, 2, False, 4, False]] * 2


def open_with_a_backend_that_fails(world):
    world.close()

    def fail(*args: object) -> None:
        raise RuntimeError("no route to host")

    dist.Backend.register_backend("broken", fail, devices=["cpu"])
    try:
        allstep.init(backend="broken")
    except WorldError as error:
        outcome = str(error), dist.is_initialized(), allstep.World.current()
    with allstep.init() as again:
        return *outcome, again.all_reduce(1)


def test_a_failed_init_leaves_nothing_half_set():
    for message, initialised, current, total in run_ranks(open_with_a_backend_that_fails, 2):
        assert "broken could not connect the ranks" in message
        assert "no route to host" in message
        assert (initialised, current, total) == (False, None, 2)


def one_rank_raises(world):
    if world.rank == 1:
        raise KeyError("only here")
    world.barrier()


def test_a_rank_that_raises_is_not_held_up_by_ranks_that_wait_for_it():
    with pytest.raises(RanksError, match="rank 1 of 2 raised") as raised:
        run_ranks(one_rank_raises, 2, timeout=30)
    assert isinstance(raised.value.__cause__, KeyError)


def main_rank_raises(world):
    if world.is_main:
        raise KeyError("only here")


def test_the_main_rank_waits_for_nobody_when_it_raises():
    with pytest.raises(RanksError, match="rank 0 of 2 raised"):
        run_ranks(main_rank_raises, 2, timeout=30)


def leave_in_turn(world, folder):
    """The main rank closes at once; the other, still at work, watches that it does not get away."""
    closing, closed = folder / "closing", folder / "closed"
    if world.is_main:
        with world.main_first():
            closing.touch()
        world.close()
        closed.touch()
        return True
    assert poll(closing.exists, time.monotonic() + 30)
    left_early = poll(closed.exists, time.monotonic() + 0.3)
    with world.main_first():
        pass
    world.close()
    return not left_early and poll(closed.exists, time.monotonic() + 30)


def test_the_main_rank_keeps_the_store_until_the_last_rank_has_left(tmp_path):
    assert run_ranks(leave_in_turn, 2, tmp_path) == [True] * 2
