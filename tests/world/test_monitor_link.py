"""Ranks at a service: the roll call before they connect, and what the service hears of a healthy world."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

import allstep
from allstep.engine import Engine, Events
from allstep.errors import WorldError
from allstep.monitor.service import AllArrived
from allstep.parallel.timed_ddp import TimedDDP
from allstep.testing import run_ranks
from allstep.world import World, internals
from tests.world.monitor_service import Served, serving

T = TypeVar("T")


def run_at(served: Served, fn: Callable[..., T], world_size: int, *args: Any) -> list[T]:
    """`run_ranks`, with the worlds at the test's own service."""
    return run_ranks(elsewhere, world_size, served.env, fn, args)


def elsewhere(world: World, env: dict[str, str], fn: Callable[..., T], args: tuple[Any, ...]) -> T:
    world.close()
    os.environ.update(env)
    with allstep.init() as again:
        return fn(again, *args)


NO_SUPERVISOR = {"ALLSTEP_CHANNEL": ""}
QUICK = 10.0  # seconds; what is found when all have come takes less than two on an idle machine


def open_again(world: World, **options: Any) -> tuple[str, float, World | None]:
    """What init says to this rank, and in what time."""
    world.barrier()
    world.close()
    began = time.monotonic()
    try:
        with allstep.init(**options) as again:
            again.barrier()
        said = ""
    except WorldError as error:
        said = str(error)
    return said, time.monotonic() - began, World.current()


def several_worlds(world: World) -> list[str]:
    return [open_again(world)[0], reopened(), reopened()]


def reopened() -> str:
    with allstep.init() as world:
        return str(world.all_reduce(world.rank))


def test_a_process_may_open_worlds_in_a_row_at_one_service():
    with serving(2) as served:
        assert run_at(served, several_worlds, 2) == [["", "1", "1"]] * 2
        assert [type(event) for event in served.events] == [AllArrived] * 4


def other_facts(world: World) -> tuple[str, float, World | None]:
    settings = {"lr": 0.1 * (world.rank + 1), "seed": 7}
    return open_again(world, facts={"config": settings}, timeout=120)


def test_settings_that_differ_are_named_with_every_ranks_value_on_all_ranks():
    with serving(2) as served:
        results = run_at(served, other_facts, 2)
    for said, took, current in results:
        assert said == "ranks disagree about config.lr (rank 0: '0.1'; rank 1: '0.2'); give all ranks the same"
        assert took < QUICK
        assert current is None


def other_digest(world: World) -> tuple[str, float, World | None]:
    os.environ["ALLSTEP_CONFIG"] = f"digest-{world.rank}"
    return open_again(world, timeout=120)


def test_the_digest_of_the_launchers_configuration_is_compared():
    with serving(2) as served:
        results = run_at(served, other_digest, 2)
    assert [said for said, _, _ in results] == [
        "ranks disagree about ALLSTEP_CONFIG (rank 0: 'digest-0'; rank 1: 'digest-1'); give all ranks the same"
    ] * 2


def other_world_size(world: World) -> tuple[str, float, World | None]:
    if world.rank == 1:
        os.environ.update(WORLD_SIZE="3", LOCAL_WORLD_SIZE="3", ROLE_WORLD_SIZE="3")
    return open_again(world, timeout=120)


def test_differing_world_sizes_are_found_at_once():
    with serving(2) as served:
        results = run_at(served, other_world_size, 2)
    (said, took, _), (same, took_too, _) = results
    assert said == same
    assert "rank 1 (process" in said or "ranks 0 and 1 disagree about world_size" in said
    assert "3" in said
    assert max(took, took_too) < QUICK


def two_of_three(world: World) -> tuple[str, float, World | None] | None:
    if world.rank == 1:
        world.barrier()
        world.close()
        return None
    return open_again(world, timeout=3)


def test_a_rank_that_does_not_come_is_named_on_all_that_did():
    with serving(3) as served:
        first, absent, third = run_at(served, two_of_three, 3)
    assert absent is None
    for result in (first, third):
        assert result is not None
        assert "1 of 3 ranks did not arrive within 3 s: 1;" in result[0]


def one_is_slow(world: World) -> list[str]:
    seen = []

    def look(engine: Engine) -> None:
        seen.append(internals(world).activity.waiting)

    if world.rank == 1:
        time.sleep(2.5)  # rank 0 has beaten meanwhile
    world.barrier()
    world.all_reduce(1)
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED, look)
    engine.run(range(2))
    return seen


@pytest.mark.slow
def test_the_service_knows_in_which_collective_and_line_a_rank_waits():
    with serving(2) as served:
        assert run_at(served, one_is_slow, 2) == [["", ""]] * 2
        waits = {beat.waiting for beat in served.beats[0].values()}
    line = one_is_slow.__code__.co_firstlineno + 8
    assert f"barrier #1 at test_monitor_link.py:{line}" in waits


def votes_late(world: World) -> None:
    if world.rank == 1:
        time.sleep(2.5)  # being late
    Engine(lambda engine, batch: None, name="trainer").run(range(2))


@pytest.mark.slow
def test_the_service_knows_in_which_engine_a_rank_waits_for_agreement():
    with serving(2) as served:
        run_at(served, votes_late, 2)
        waits = {(beat.waiting, beat.engine) for beat in served.beats[0].values()}
    assert ("agreement", "trainer") in waits


SLEEP = 0.04


def one_sleeps_in_its_step(world: World) -> tuple[float, float, str]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
    model = world.wrap(module)
    assert isinstance(model, TimedDDP)

    def step(engine: Engine, batch: torch.Tensor) -> None:
        if world.rank == 1:
            time.sleep(SLEEP)  # being slow
        output = {"nested": [model(batch)]}
        output["nested"][0].sum().backward()

    trainer = Engine(step)
    began = time.monotonic()
    trainer.run([torch.randn(4, 16) for _ in range(30)])
    wall = (time.monotonic() - began) / 30
    beat = internals(world).activity.heartbeat(world.rank, 0, 1)
    return beat.own_step, wall, beat.waiting


@pytest.mark.slow
def test_the_wait_for_gradients_is_not_a_ranks_own_time():
    with serving(2) as served:
        fast, slow = run_at(served, one_sleeps_in_its_step, 2)
    assert slow[0] >= SLEEP
    assert fast[1] >= SLEEP  # it takes as long as the slow one,
    assert fast[0] < SLEEP / 2  # but not by itself
    assert fast[2] == slow[2] == ""


def watched_alone(world: World) -> tuple[bool, bool]:
    world.close()
    with allstep.init() as with_service:
        watched = internals(with_service).reporter is not None
    del os.environ["ALLSTEP_CHANNEL"]
    with allstep.init() as without:
        return watched, internals(without).reporter is None


def test_a_world_of_one_is_watched_only_by_a_supervisor_that_started_it():
    with serving(1) as served:
        assert run_at(served, watched_alone, 1) == [(True, True)]
        assert any(isinstance(event, AllArrived) for event in served.events)


def sidecar_in_a_row(world: World) -> list[bool]:
    """Worlds without a supervisor, each with a service of its own."""
    seen = []
    for _ in range(3):
        world.all_reduce(1)
        seen.append(internals(world).reporter is not None)
        world.close()
        world = allstep.init()
    world.close()
    return seen


@pytest.mark.slow
def test_without_a_supervisor_each_world_has_a_service_of_its_own():
    assert run_ranks(elsewhere, 2, NO_SUPERVISOR, sidecar_in_a_row, ()) == [[True] * 3] * 2


def other_facts_at_a_sidecar(world: World) -> tuple[str, float, World | None]:
    return open_again(world, facts={"config": {"lr": world.rank}}, timeout=120)


@pytest.mark.slow
def test_a_sidecar_judges_as_a_supervisor_does_and_the_ranks_can_go_on():
    for said, took, _ in run_ranks(elsewhere, 2, NO_SUPERVISOR, other_facts_at_a_sidecar, ()):
        assert said.startswith("ranks disagree about config.lr (rank 0: '0'; rank 1: '1')")
        assert took < QUICK
