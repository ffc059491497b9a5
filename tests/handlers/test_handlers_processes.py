"""One rank's early stopping or time limit, over real ranks: all stop at the same iteration and know who asked."""

from __future__ import annotations

import pytest

from allstep import EarlyStopping, Engine, Events, TimeLimit
from allstep.testing import run_ranks
from allstep.world import World

pytestmark = pytest.mark.slow

ITERATIONS = 10_000  # far more than are run


def stopped(world: World, how: str, asking: int) -> tuple[int, int, str | None]:
    trainer = Engine(lambda engine, batch: world.all_reduce(1.0))
    if world.rank == asking and how == "early stopping":
        EarlyStopping(2, lambda engine: 0.0, trainer).attach(trainer, Events.EPOCH_COMPLETED)
    elif world.rank == asking:
        TimeLimit(0.05).attach(trainer)
    trainer.run([0] * 5, max_epochs=ITERATIONS // 5, window=4)
    return trainer.state.epoch, trainer.state.iteration, trainer.state.stop_reason


@pytest.mark.parametrize(("ranks", "asking"), [(2, 1), (3, 0), (4, 2)])
@pytest.mark.parametrize(("how", "said"), [("early stopping", "no better score"), ("time limit", "time limit of ")])
def test_what_one_rank_decides_stops_all_at_one_iteration(how: str, said: str, ranks: int, asking: int) -> None:
    results = run_ranks(stopped, ranks, how, asking)
    assert results == [results[0]] * ranks
    epoch, iteration, reason = results[0]
    assert 0 < iteration < ITERATIONS
    assert reason is not None
    assert reason.startswith(f"rank {asking}: {said}")
    if how == "early stopping":  # the first score, and two that are no better; it holds at the epoch's end
        assert (epoch, iteration) == (3, 15)
