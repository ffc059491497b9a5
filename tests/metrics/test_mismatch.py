"""Ranks whose metrics differ, or have seen nothing: the same error on all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from allstep import Engine
from allstep.coordination import Coordinator
from allstep.errors import MetricMismatchError, NotComputableError
from allstep.metrics import Mean, Metrics
from allstep.testing import simulate
from tests.metrics.noting import Noting, alone, batches
from tests.metrics.worlds import take


def test_a_metric_that_saw_nothing_anywhere_is_the_same_error_on_all_ranks() -> None:
    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator)
        some = {"some": lambda o: o, "none": lambda o: None}
        Metrics({"some": Noting(), "none": Noting()}).attach(engine, some)
        with pytest.raises(NotComputableError) as caught:
            engine.run([1, 2])
        return str(caught.value)

    errors = simulate(rank, 2)
    assert errors == [errors[0]] * 2
    assert "seen no sample on any rank: none." in errors[0]


def test_alone_too_a_metric_that_has_seen_nothing_says_so() -> None:
    with pytest.raises(NotComputableError, match="none"):
        alone(Metrics({"none": Noting()}), [1], output_transform=lambda o: None)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_with_different_metrics_raise_the_same_error_when_the_run_begins(world_size: int) -> None:
    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator)
        classes = 4 if coordinator.rank else 5
        Metrics({"accuracy": MulticlassAccuracy(classes)}).attach(engine)
        with pytest.raises(MetricMismatchError) as caught:
            engine.run(batches(2))
        return str(caught.value)

    errors = simulate(rank, world_size)
    assert errors == [errors[0]] * world_size
    assert "metric 'accuracy (MulticlassAccuracy)', state 'tp'" in errors[0]
    assert "shape (5,) on rank 0" in errors[0]


@pytest.mark.parametrize(
    ("mine", "told"),
    [
        (dict, "no further state on rank 1"),
        (lambda: {"b": Noting(), "a": Noting()}, "metric 'b (Noting)'"),
        (lambda: {"a": Noting(), "c": Noting()}, "metric 'c (Noting)'"),
        (lambda: {"a": Noting(), "b": Mean()}, "metric 'b (Mean)'"),
    ],
    ids=["none", "order", "name", "type"],
)
def test_names_order_and_types_are_compared(mine: Any, told: str) -> None:
    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator)
        made = mine() if coordinator.rank == 1 else {"a": Noting(), "b": Noting()}
        if made:
            Metrics(made).attach(engine)
        with pytest.raises(MetricMismatchError) as caught:
            engine.run([1])
        return str(caught.value)

    errors = simulate(rank, 3)
    assert errors == [errors[0]] * 3
    assert told in errors[0]
    assert "on ranks 0, 2" in errors[0]


def test_a_state_whose_shape_changes_on_one_rank_is_an_error_on_all() -> None:
    class Growing(Noting):
        def update(self, preds: Any, target: Any = None) -> None:
            self.count = torch.zeros(int(preds), dtype=torch.int64)

    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator)
        Metrics({"it": Growing()}).attach(engine)
        with pytest.raises(MetricMismatchError) as caught:
            engine.run([3 + coordinator.rank])
        return str(caught.value)

    errors = simulate(rank, 2)
    assert errors == [errors[0]] * 2
    assert "shape (3,) on rank 0" in errors[0]
    assert "shape (4,) on rank 1" in errors[0]
