"""States that updates and `compute` do unusual things with: as tensors declared, numbers become; results spoil none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchmetrics import Metric, MetricCollection

from allstep import Engine, Events
from allstep.coordination import Coordinator
from allstep.errors import MetricError, MetricMismatchError
from allstep.metrics import Metrics
from allstep.testing import simulate
from tests.metrics.worlds import take


class BecomesANumber(Metric):
    """Its update makes a number of a state that was declared as a tensor."""

    full_state_update = False
    n: Any

    def __init__(self, reduction: Any = "sum") -> None:
        super().__init__()
        self.add_state("n", torch.tensor(0), reduction)

    def update(self, x: torch.Tensor) -> None:
        self.n = int(self.n) + len(x)

    def compute(self) -> Any:
        return self.n


def error_of(coordinator: Coordinator, reduction: Any, batches: int, kind: type[Exception], usage: Any) -> str:
    engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
    Metrics({"it": BecomesANumber(reduction)}).attach(engine, usage=usage)
    with pytest.raises(kind) as caught:
        engine.run([torch.ones(2)] * batches)
    return str(caught.value)


@pytest.mark.parametrize("usage", ["epoch", "running"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_tensor_that_becomes_a_number_on_some_ranks_is_the_same_error_on_all(reduction: Any, usage: Any) -> None:
    def rank(coordinator: Coordinator) -> str:
        return error_of(coordinator, reduction, coordinator.rank, MetricMismatchError, usage)

    errors = simulate(rank, 3)
    assert errors == [errors[0]] * 3
    assert "state 'n'" in errors[0]
    assert "an int in the place of a tensor" in errors[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_tensor_that_becomes_a_number_on_all_ranks_is_an_error_that_names_it(world_size: int) -> None:
    said = simulate(lambda c: error_of(c, "sum", 1, MetricError, "epoch"), world_size)
    assert said == [said[0]] * world_size
    assert "metric 'it' (BecomesANumber), state 'n', was declared as a tensor, and its update made an int" in said[0]


def the_first(stack: Any) -> Any:
    return stack[0]


class SpoilsItsStates(Metric):
    """Writes to its states when it is computed."""

    full_state_update = False

    def __init__(self, reduction: Any) -> None:
        super().__init__()
        self.add_state("m", torch.tensor(0.0), reduction)
        self.add_state("kept", [], None)

    def update(self, x: torch.Tensor) -> None:
        self.m = self.m + x.sum()
        self.kept.append(x)

    def compute(self) -> torch.Tensor:
        self.m /= 10
        for each in self.kept:
            each *= 2
        return self.m.sum() + sum(each.sum() for each in self.kept) / 1000


class SpoilsItsStatesToo(SpoilsItsStates):
    def compute(self) -> torch.Tensor:
        return -super().compute()


@pytest.mark.parametrize("reduction", ["sum", "mean", None, the_first])
def test_a_compute_that_writes_to_its_states_leaves_those_of_the_rank(reduction: Any) -> None:
    def rank(coordinator: Coordinator) -> list[list[float]]:
        engine = Engine(take, coordinator=coordinator)
        members = MetricCollection([SpoilsItsStates(reduction), SpoilsItsStatesToo(reduction)])
        Metrics(members).attach(engine, usage="running")
        seen: list[list[float]] = []
        engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e: seen.append([float(v) for v in e.state.metrics.values()])
        )
        engine.run([torch.full((1,), 10.0 * at) for at in (1, 2, 3)])
        return seen

    alone, first, second = simulate(rank, 1)[0], *simulate(rank, 2)
    assert first == second
    for at, expected in enumerate((10.0, 30.0, 60.0)):
        value = expected / 10 + 2 * expected / 1000
        assert alone[at] == pytest.approx([value, -value])
        ranks = 1 if reduction in ("mean", the_first) else 2
        over_two = ranks * expected / 10 + 4 * expected / 1000
        assert first[at] == pytest.approx([over_two, -over_two])
