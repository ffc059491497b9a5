"""Which metrics of a collection travel once."""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from allstep.metrics.nodes import followers, nodes
from allstep.metrics.plan import make_plan
from allstep.metrics.sharing import update_alike


def states_of(*members: Metric, groups: Any = True) -> list[tuple[str, str]]:
    """Metrics and states that are packed of a collection."""
    entries = {"c": MetricCollection(list(members), compute_groups=groups)}
    plan = make_plan("event", nodes(entries), followers(entries.values()))
    return [(line.metric, line.state) for line in plan.schema]


def test_metrics_that_update_alike_are_packed_once() -> None:
    packed = states_of(MulticlassPrecision(5), MulticlassRecall(5), MulticlassF1Score(5), MulticlassAccuracy(5))
    assert [state for _, state in packed] == ["tp", "fp", "tn", "fn"]
    assert len({metric for metric, _ in packed}) == 1


def test_curves_share_their_scores() -> None:
    assert len(states_of(BinaryAUROC(), BinaryAveragePrecision())) == 2


def test_other_arguments_or_another_update_do_not_share() -> None:
    assert not update_alike(MulticlassPrecision(5), MulticlassRecall(5, top_k=2))
    assert not update_alike(MulticlassPrecision(5), MulticlassRecall(5, ignore_index=0))
    assert not update_alike(MulticlassPrecision(5, average="macro"), MulticlassRecall(5, average="micro"))
    assert not update_alike(MulticlassPrecision(5), MulticlassConfusionMatrix(5))
    assert not update_alike(BinaryAUROC(), BinaryAUROC(thresholds=10))
    assert not update_alike(BinaryAUROC(thresholds=[0.1, 0.5]), BinaryAUROC(thresholds=[0.1, 0.6]))
    assert update_alike(BinaryAUROC(thresholds=10), BinaryAveragePrecision(thresholds=10))


def test_the_groups_that_a_user_gave_hold() -> None:
    members = (MulticlassPrecision(5), MulticlassRecall(5), MulticlassF1Score(5))
    assert len(states_of(*members, groups=False)) == 12
    assert len(states_of(*members, groups=[["MulticlassPrecision", "MulticlassRecall"]])) == 8


class Counting(Metric):
    full_state_update = False
    n: torch.Tensor

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step
        self.add_state("n", torch.tensor(0), "sum")

    def update(self) -> None:
        self._step()

    def _step(self) -> None:
        self.n += self.step

    def compute(self) -> torch.Tensor:
        return self.n


class Looking(Counting):
    def update(self) -> None:
        self.n += vars(self)["step"]


class Above(Counting):
    def update(self) -> None:
        super().update()


def test_what_a_method_of_update_reads_is_compared_and_what_cannot_be_known_is_not_shared() -> None:
    assert update_alike(Counting(1), Counting(1))
    assert not update_alike(Counting(1), Counting(2))
    assert not update_alike(Looking(1), Looking(1))
    assert not update_alike(Above(1), Above(1))
