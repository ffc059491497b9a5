"""`World.main_first` over real ranks: one goes first, and the others wait for it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import allstep
from allstep.errors import WorldError
from allstep.testing import run_ranks
from allstep.world.bounded_store import poll


def in_order(world, folder: Path, firsts: tuple[int, ...] = (0,), local: bool = False):
    """Each first watches, once the others wait for it, that none of them enters."""
    (folder / f"waiting-{world.rank}").touch()
    with world.main_first(local=local):
        early = False
        if world.rank in firsts:
            assert poll(lambda: len(list(folder.glob("waiting-*"))) == world.world_size, time.monotonic() + 30)
            rest = [folder / f"in-{rank}" for rank in range(world.world_size) if rank not in firsts]
            early = poll(lambda: any(each.exists() for each in rest), time.monotonic() + 0.3)
        (folder / f"in-{world.rank}").touch()
        seen = sorted(int(path.name[3:]) for path in folder.glob("in-*"))
    return early, seen


def test_the_others_wait_until_the_main_rank_is_done(tmp_path):
    results = run_ranks(in_order, 3, tmp_path)
    assert results[0] == (False, [0])
    assert all(0 in seen for _, seen in results[1:])


def on_two_nodes(world, folder: Path):
    rank = world.rank
    world.close()
    os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2", GROUP_RANK=str(rank // 2), GROUP_WORLD_SIZE="2")
    with allstep.init() as nodes:
        assert (nodes.node_rank, nodes.local_rank) == divmod(rank, 2)
        return in_order(nodes, folder, firsts=(0, 2), local=True)


def test_local_lets_one_rank_of_each_node_go_first(tmp_path):
    results = run_ranks(on_two_nodes, 4, tmp_path)
    assert [early for early, _ in results] == [False] * 4
    assert 0 in results[1][1]
    assert 2 in results[3][1]


def raising(world):
    outcome = []
    for _ in range(2):
        try:
            with world.main_first():
                outcome.append("ran")
                if world.is_main:
                    raise KeyError("body")
        except KeyError:
            outcome.append("raised")
    return outcome


def test_an_exception_of_the_main_rank_frees_the_others_and_stays_its_own():
    assert run_ranks(raising, 3) == [["ran", "raised"] * 2, ["ran"] * 2, ["ran"] * 2]


def impatient(world):
    try:
        if world.is_main:
            world.barrier()
        else:
            with world.main_first(timeout=0.05):
                return "ran"
    except WorldError as error:
        world.barrier()
        return str(error)


def test_waiting_has_an_end_that_names_the_remedy():
    _, message = run_ranks(impatient, 2)
    assert "waited 0.05 s for the rank that goes first" in message
    assert "longer timeout" in message
