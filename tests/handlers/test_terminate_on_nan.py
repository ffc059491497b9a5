"""TerminateOnNan: what is not finite, and that one rank's finding stops all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from allstep import Alone, Engine, Events, TerminateOnNan
from allstep.testing import SimulatedRank, run_ranks, simulate
from allstep.world import World

NAN = math.nan


def stopped_at(outputs: list[Any], **options: Any) -> int:
    engine = Engine(lambda engine, batch: batch, coordinator=Alone())
    TerminateOnNan(**options).attach(engine)
    return engine.run(outputs).iteration


@pytest.mark.parametrize(
    "bad",
    [
        NAN,
        math.inf,
        -math.inf,
        complex(0, NAN),
        torch.tensor(NAN),
        torch.tensor([1.0, -math.inf]),
        torch.tensor([1.0, NAN], dtype=torch.bfloat16),
        (1.0, {"loss": [torch.tensor(NAN)]}),
    ],
)
def test_ends_the_run_at_an_output_that_is_not_finite(bad: Any) -> None:
    assert stopped_at([0.0, bad, 0.0]) == 2


@pytest.mark.parametrize(
    "good", [None, 1, True, 0.5, "nan", b"nan", torch.tensor([1, 2]), {"loss": torch.zeros(3)}, [], object()]
)
def test_goes_on_at_any_other_output(good: Any) -> None:
    assert stopped_at([good, good]) == 2


def test_looks_at_what_output_transform_picks() -> None:
    outputs = [{"loss": 1.0, "other": NAN}, {"loss": NAN, "other": NAN}, {"loss": 1.0, "other": 1.0}]
    assert stopped_at(outputs, output_transform=lambda output: output["loss"]) == 2


def test_looks_only_every_so_many_iterations() -> None:
    assert stopped_at([NAN] * 10, every=4) == 4


def test_finds_a_nan_of_each_run_anew() -> None:
    engine = Engine(lambda engine, batch: batch, coordinator=Alone())
    TerminateOnNan().attach(engine)
    assert engine.run([NAN, 0.0]).iteration == 1
    engine.load_state_dict({"iteration": 0, "max_epochs": 1, "epoch_length": 2})
    assert engine.run([NAN, 0.0]).iteration == 1


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_every_below_one_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match="every is"):
        TerminateOnNan(every=every)


def _nan_on_one_rank(coordinator: SimulatedRank, window: int | None) -> tuple[int, str | None, str]:
    def step(engine: Engine, batch: int) -> float:
        return NAN if coordinator.rank == 1 and engine.state.iteration >= 3 else 0.0

    engine = Engine(step, coordinator=coordinator, name="nan")
    TerminateOnNan().attach(engine)
    ended: list[str] = []
    engine.add_event_handler(Events.TERMINATE, lambda: ended.append("terminate"))
    state = engine.run([0] * 1000, window=window)
    return state.iteration, state.stop_reason, *ended


def test_a_nan_on_one_rank_stops_all_at_the_same_iteration_and_names_the_rank() -> None:
    results = simulate(_nan_on_one_rank, 3, None)
    assert len(set(results)) == 1
    iteration, reason, ended = results[0]
    assert 3 <= iteration < 100
    assert (reason, ended) == ("rank 1: the output of iteration 3 is not finite", "terminate")


def test_with_windows_of_one_all_stop_after_that_very_iteration() -> None:
    results = simulate(_nan_on_one_rank, 2, 1)
    assert results == [(3, "rank 1: the output of iteration 3 is not finite", "terminate")] * 2


def _nan_in_a_filler(coordinator: SimulatedRank, uneven: str) -> tuple[int, str | None]:
    engine = Engine(lambda engine, batch: 0.0 if engine.state.active else NAN, coordinator=coordinator, name="filler")
    TerminateOnNan().attach(engine)
    state = engine.run([0] * (1 if coordinator.rank else 6), uneven=uneven)
    return state.iteration, state.stop_reason


def test_the_output_of_an_iteration_without_a_batch_is_not_looked_at() -> None:
    assert simulate(_nan_in_a_filler, 2, "longest") == [(6, None)] * 2


def _train_with_a_nan(world: World) -> tuple[int, str | None, bool]:
    model = world.wrap(torch.nn.Linear(2, 1))

    def step(engine: Engine, batch: torch.Tensor) -> torch.Tensor:
        loss = model(batch).mean()
        (loss * engine.state.weight).backward()
        return loss.detach()

    engine = Engine(step)
    TerminateOnNan().attach(engine)
    batches = [torch.full((2, 2), NAN if world.rank == 1 and at == 4 else 1.0) for at in range(400)]
    state = engine.run(batches, window=1)
    return state.iteration, state.stop_reason, bool(torch.isnan(next(model.parameters()).grad).any())


@pytest.mark.slow
def test_real_ranks_stop_together() -> None:
    expected = (5, "rank 1: the output of iteration 5 is not finite", True)
    assert run_ranks(_train_with_a_nan, 2) == [expected] * 2
