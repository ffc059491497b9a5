"""A rank that has seen nothing, beside ranks whose first update gave the states another shape or type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchmetrics import Metric
from torchmetrics.regression import ExplainedVariance, MeanSquaredError, R2Score

from allstep import Engine
from allstep.coordination import Coordinator
from allstep.errors import MetricMismatchError
from allstep.metrics import Metrics
from allstep.testing import simulate
from tests.metrics.worlds import all_same_bits, deal, on_one, over_ranks, take


def batches(count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(6)
    return [(torch.rand(4, 2, generator=generator), torch.rand(4, 2, generator=generator)) for _ in range(count)]


class Widening(Metric):
    """Its states take the shape and type of what it is given."""

    full_state_update = False
    total: torch.Tensor
    last: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0), "sum")
        self.add_state("last", torch.tensor(0.0), None)

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.total = self.total + preds.double().sum(0)
        self.last = preds[-1]

    def compute(self) -> torch.Tensor:
        return self.total + self.last.sum() * 0


class Last(Widening):
    """Without a state that is reduced element by element."""

    def __init__(self) -> None:
        super().__init__()
        del self._defaults["total"], self._reductions["total"], self._persistent["total"]

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.last = preds[-1]

    def compute(self) -> torch.Tensor:
        return self.last.sum()


class Rows(Widening):
    """Begins with what cannot be spread over what it becomes."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(3), "sum")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.total = preds.sum(0)


def test_a_beginning_that_cannot_be_spread_is_an_error_on_all() -> None:
    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        Metrics({"it": Rows()}).attach(engine)
        with pytest.raises(MetricMismatchError) as caught:
            engine.run(batches(1) * coordinator.rank)
        return str(caught.value)

    errors = simulate(rank, 2)
    assert errors[0] == errors[1]
    assert "shape (3,) on rank 0" in errors[0]


def test_a_state_that_is_stacked_takes_on_a_shape_too() -> None:
    data = batches(2)
    for found in over_ranks(lambda: {"it": Last()}, [[], data], usage="running"):
        assert float(found["it"]) == pytest.approx(float(data[1][0][-1].sum()))


def make() -> dict[str, Metric]:
    return {"mse": MeanSquaredError(), "r2": R2Score(), "variance": ExplainedVariance(), "own": Widening()}


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_ranks_that_saw_nothing_take_on_the_shapes_of_the_others(empty: int) -> None:
    data = batches(5)
    single = on_one(make, data)
    found = over_ranks(make, deal(data, 3, empty=empty))
    assert all_same_bits(found)
    for name, value in single.items():
        torch.testing.assert_close(found[0][name], value)


def test_shapes_are_adopted_in_each_epoch_and_run_and_before_a_later_batch() -> None:
    data = batches(3)

    def rank(coordinator: Coordinator) -> list[float]:
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        Metrics({"r2": R2Score()}).attach(engine, usage="running")
        mine = [data[0], data[1]] if coordinator.rank == 0 else []
        seen = [float(engine.run(mine, max_epochs=2).metrics["r2"])]
        seen.append(float(engine.run(data if coordinator.rank else data[:1]).metrics["r2"]))
        return seen

    found = simulate(rank, 2)
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(float(on_one(lambda: {"r2": R2Score()}, data[:2])["r2"]))
    assert found[0][1] == pytest.approx(float(on_one(lambda: {"r2": R2Score()}, [*data, data[0]])["r2"]), abs=1e-5)


def test_shapes_of_ranks_that_all_saw_batches_stay_an_error_on_all() -> None:
    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        Metrics({"r2": R2Score()}).attach(engine)
        width = 2 + coordinator.rank
        with pytest.raises(MetricMismatchError) as caught:
            engine.run([(torch.rand(4, width), torch.rand(4, width))] if coordinator.rank < 2 else [])
        return str(caught.value)

    errors = simulate(rank, 3)
    assert errors == [errors[0]] * 3
    assert "metric 'r2 (R2Score)', state 'sum_squared_error'" in errors[0]
    assert "shape (2,) on ranks 0, 2; a tensor, sum, float32, shape (3,) on rank 1" in errors[0]


def test_a_run_that_ended_early_leaves_no_difference_for_the_next() -> None:
    def rank(coordinator: Coordinator) -> float:
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        metrics = Metrics({"r2": R2Score()}).attach(engine)
        if coordinator.rank == 0:
            metrics.entries["r2"].update(*batches(1)[0])
        return float(engine.run(batches(2)).metrics["r2"])

    assert len(set(simulate(rank, 2))) == 1
