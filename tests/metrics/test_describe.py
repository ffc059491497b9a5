"""What ranks compare beside states: how metrics were made. Different scripts differ, equal ones never do."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.retrieval import RetrievalMAP
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MinMaxMetric

from allstep import Engine, Events
from allstep.coordination import Coordinator
from allstep.errors import MetricMismatchError
from allstep.metrics import EPOCH, RUNNING, Mean, Metrics, Sum, Usage
from allstep.metrics.describe import descriptions
from allstep.metrics.nodes import Entry
from allstep.testing import simulate
from tests.metrics.worlds import take

Made = Mapping[str, Entry]


def mismatch(make: Callable[[int], Made], usage: Callable[[int], Any] = lambda rank: "epoch") -> str:
    """The error with which a run of two ranks begins, the same on both."""

    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator)
        Metrics(make(coordinator.rank)).attach(engine, usage=usage(coordinator.rank))
        with pytest.raises(MetricMismatchError) as caught:
            engine.run([1])
        return str(caught.value)

    errors = simulate(rank, 2)
    assert errors[0] == errors[1]
    return errors[0]


def pair(*, swapped: bool = False) -> tuple[Metric, Metric]:
    p, r = MulticlassPrecision(3), MulticlassRecall(3)
    return (r, p) if swapped else (p, r)


def test_an_argument_that_no_shape_shows_is_named() -> None:
    said = mismatch(lambda rank: {"a": MulticlassAccuracy(3, average="weighted" if rank else "macro")})
    assert "metric 'a', at EPOCH_COMPLETED, is" in said
    assert "average='macro'" in said
    assert "average='weighted'" in said
    assert "on rank 0" in said


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: Sum(weighted=True), lambda: Sum(weighted=False)),
        (lambda: Sum(dtype=torch.float64), lambda: Sum(dtype=torch.int64)),
        (lambda: BinaryAUROC(max_fpr=None), lambda: BinaryAUROC(max_fpr=0.5)),
        (lambda: MinMaxMetric(MulticlassAccuracy(3)), lambda: MinMaxMetric(MulticlassAccuracy(3, top_k=2))),
        (lambda: RetrievalMAP(aggregation="mean"), lambda: RetrievalMAP(aggregation="max")),
        (lambda: ClasswiseWrapper(MulticlassAccuracy(2, average=None), labels=["a", "b"]), None),
        (lambda: pair()[0] * 2, lambda: pair()[0] * 3),
        (lambda: -pair()[0], lambda: abs(pair()[0])),
        (lambda: pair()[0][0], lambda: pair()[0][1]),
        (lambda: MetricCollection([Mean()], prefix="a"), lambda: MetricCollection([Mean()], prefix="b")),
    ],
)
def test_metrics_made_otherwise_are_described_otherwise(one: Any, other: Any) -> None:
    other = other or (lambda: ClasswiseWrapper(MulticlassAccuracy(2, average=None), labels=["b", "a"]))
    assert descriptions({"it": one()}) == descriptions({"it": one()})
    assert descriptions({"it": one()}) != descriptions({"it": other()})


def test_another_formula_of_the_same_metrics_is_a_difference() -> None:
    def make(rank: int) -> Made:
        p, r = pair()
        return {"p": p, "r": r, "f": p / r if rank else p * r}

    said = mismatch(make)
    assert "metric 'f', at EPOCH_COMPLETED, is the formula mul(p, r) on rank 0; the formula true_divide(p, r)" in said


def test_a_formula_says_which_metric_it_is_of() -> None:
    p, r = pair()
    assert descriptions({"p": p, "f": p * r})[-2] == ("f", "the formula mul(p, f.metric_b)")
    assert descriptions({"r": r, "f": p * r})[-2] == ("f", "the formula mul(f.metric_a, r)")


def test_members_that_share_the_states_of_others_are_compared_too() -> None:
    def make(rank: int) -> Made:
        first, second = pair()
        members = {"a": first, "b": second} if rank else {"a": first, "c": second}
        return {"it": MetricCollection(members)}

    said = mismatch(make)
    assert "metric 'it.c (MulticlassRecall)', with the states of it.a (MulticlassPrecision)" in said
    assert "metric 'it.b (MulticlassRecall)'" in said


def test_a_filters_numbers_are_compared() -> None:
    said = mismatch(lambda rank: {"n": Mean()}, lambda rank: RUNNING.every(2 + rank))
    assert "ITERATION_COMPLETED(every=2) on rank 0" in said
    assert "ITERATION_COMPLETED(every=3) on rank 1" in said
    every = Events.ITERATION_COMPLETED
    said = mismatch(lambda rank: {"n": Mean()}, lambda rank: EPOCH.only(every(once=1 + rank)))
    assert "fed at ITERATION_COMPLETED(once=2) on rank 1" in said
    said = mismatch(lambda rank: {"n": Mean()}, lambda rank: Usage(resets=Events.STARTED) if rank else EPOCH)
    assert "counted from STARTED on" in said


class OfMyOwn(Metric):
    """A user's metric that keeps much that is a rank's own."""

    full_state_update = False
    n: torch.Tensor

    def __init__(self, rank: int, folder: str) -> None:
        super().__init__()
        self.rank = rank
        self.folder = folder
        self.pid = os.getpid() + rank
        self.weights = torch.rand(3) + rank
        self.seen: set[str] = {f"rank {rank}"}
        self.add_state("n", torch.tensor(0), "sum")

    def update(self, value: Any) -> None:
        self.n += 1

    def compute(self) -> torch.Tensor:
        return self.n


def ranks_own(rank: int) -> Made:
    """What one script makes on every rank."""
    p, r = pair()
    noisy = {"validate_args": rank == 0}
    return {
        "own": OfMyOwn(rank, f"/tmp/rank{rank}"),
        "f": p * r * 2 / (p + r),
        "on device": MulticlassAccuracy(3, **noisy) * torch.rand(2),
        "boot": BootStrapper(MeanMetric(), num_bootstraps=2),
        "map": RetrievalMAP(aggregation=functools.partial(lambda x, dim: x.mean(dim), dim=0)),
        "c": MetricCollection({"b": MulticlassAccuracy(3), "a": MeanMetric(nan_strategy=0.0)}, postfix="!"),
    }


def test_what_a_rank_has_of_its_own_is_no_difference() -> None:
    assert descriptions(ranks_own(0)) == descriptions(ranks_own(1))


def test_no_identity_or_address_is_described() -> None:
    for _, text in descriptions(ranks_own(0)):
        assert " at 0x" not in text
        assert "/tmp" not in text


def test_what_updates_set_on_one_rank_is_no_difference_in_the_next_run() -> None:
    class Changing(MulticlassAccuracy):
        def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
            super().update(preds, target)
            self.ignore_index = -1 - len(preds)

    def rank(coordinator: Coordinator) -> float:
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        Metrics({"a": Changing(3)}).attach(engine)
        data = [(torch.tensor([0, 1]), torch.tensor([0, 2]))] * coordinator.rank
        engine.run(data)
        engine.run(data)
        return float(engine.state.metrics["a"])

    assert len(set(simulate(rank, 2))) == 1
