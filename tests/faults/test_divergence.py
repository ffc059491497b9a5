"""Rows 33 and 35 of the fault matrix, as far as ranks that wait in different places are concerned: who waits where is
named, and the run ends."""

from __future__ import annotations

import pytest

from allstep.channel.causes import Case
from allstep.engine import Engine, Events
from allstep.testing import RanksError, run_ranks
from allstep.world import World
from tests.world.service import serving

pytestmark = pytest.mark.slow

LIMITS = "step=3,data=3,handler=3,evaluation=3,startup=60"


def verdict(fn) -> Case:
    """What the service finds out about two ranks that hang."""
    with serving(2, LIMITS) as served:
        with pytest.raises(RanksError, match="84"):
            run_ranks(fn, 2, env=served.env, timeout=60)
        assert served.verdict is not None
        return served.verdict.case


def enters_a_collective_alone(world: World) -> None:
    engine = Engine(lambda engine, batch: None, name="trainer")

    def handler(engine: Engine) -> None:
        if world.rank == 0:
            world.barrier()

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), handler)
    engine.run(range(4), window=1)


def test_a_rank_that_enters_a_collective_alone_is_named_with_its_line():
    case = verdict(enters_a_collective_alone)
    line = enters_a_collective_alone.__code__.co_firstlineno + 5
    assert f"barrier #1 at test_divergence.py:{line}" in case.explanation
    assert "rank 1 waits in agreement (engine 'trainer')" in case.explanation
    assert "must be called by all ranks" in case.explanation
    assert case.exit_code == 83


def runs_an_evaluator_alone(world: World) -> None:
    trainer = Engine(lambda engine, batch: None, name="trainer")
    evaluator = Engine(lambda engine, batch: None, name="evaluator")

    def evaluate(engine: Engine) -> None:
        if world.rank == 0:
            evaluator.run([1], window=1)

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), evaluate)
    trainer.run(iter([1, 2, 3, 4]), epoch_length=4, window=1)


def test_an_engine_that_runs_on_one_rank_only_is_named_with_the_remedy():
    case = verdict(runs_an_evaluator_alone)
    assert "engine 'evaluator'" in case.explanation
    assert "Engine(step, coordinator=Alone())" in case.explanation
