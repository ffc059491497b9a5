"""Rows 33 and 35 of the fault matrix, as far as ranks that wait in different places are concerned: who waits where is
named, and the run ends."""

from __future__ import annotations

import pytest

from allstep.engine import Engine, Events
from allstep.testing import RanksError, run_ranks
from allstep.world import World

pytestmark = pytest.mark.slow

LIMITS = "step=3,data=3,handler=3,evaluation=3,startup=60"


def found(fn) -> str:
    """What is found out about two ranks that hang."""
    with pytest.raises(RanksError) as raised:
        run_ranks(fn, 2, env={"ALLSTEP_LIMITS": LIMITS}, timeout=60)
    return str(raised.value)


def enters_a_collective_alone(world: World) -> None:
    engine = Engine(lambda engine, batch: None, name="trainer")

    def handler(engine: Engine) -> None:
        if world.rank == 0:
            world.barrier()

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), handler)
    engine.run(range(4), window=1)


@pytest.mark.nightly  # the same as a job: test_hangs.py, row 35
def test_a_rank_that_enters_a_collective_alone_is_named_with_its_line():
    report = found(enters_a_collective_alone)
    line = enters_a_collective_alone.__code__.co_firstlineno + 5
    assert f"barrier #1 at test_divergence.py:{line}" in report
    assert "rank 1 waits in agreement (engine 'trainer')" in report
    assert "must be called by all ranks" in report


def runs_an_evaluator_alone(world: World) -> None:
    trainer = Engine(lambda engine, batch: None, name="trainer")
    evaluator = Engine(lambda engine, batch: None, name="evaluator")

    def evaluate(engine: Engine) -> None:
        if world.rank == 0:
            evaluator.run([1], window=1)

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), evaluate)
    trainer.run(iter([1, 2, 3, 4]), epoch_length=4, window=1)


def test_an_engine_that_runs_on_one_rank_only_is_named_with_the_remedy():
    report = found(runs_an_evaluator_alone)
    assert "engine 'evaluator'" in report
    assert "Engine(step, coordinator=Alone())" in report
