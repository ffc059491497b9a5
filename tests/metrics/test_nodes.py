"""Which metrics of a collection hold the same states, so that one is fed and its states travel once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassFBetaScore,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.retrieval import RetrievalMRR, RetrievalPrecision

from allstep import Alone, Engine
from allstep.metrics import Metrics
from allstep.metrics.nodes import apply_compute_groups, leaders_of, metric_set, update_alike
from allstep.metrics.states import make_plan
from tests.metrics.worlds import on_one, over_ranks, take


def states_of(*members: Metric, groups: Any = True) -> list[tuple[str, str]]:
    """Metrics and states that are packed of a collection."""
    made = metric_set({"c": MetricCollection(list(members), compute_groups=groups)})
    plan = make_plan("event", made.nodes, made.leaders)
    return [(line.metric, line.state) for line in plan.schema if line.state]


def test_metrics_that_update_alike_are_packed_once() -> None:
    packed = states_of(MulticlassPrecision(5), MulticlassRecall(5), MulticlassF1Score(5), MulticlassAccuracy(5))
    assert [state for _, state in packed] == ["tp", "fp", "tn", "fn"]
    assert len({metric for metric, _ in packed}) == 1


def test_curves_share_their_scores() -> None:
    assert len(states_of(BinaryAUROC(), BinaryAveragePrecision())) == 2


def test_what_only_a_subclass_is_given_does_not_keep_members_apart() -> None:
    assert update_alike(MulticlassFBetaScore(beta=2.0, num_classes=5), MulticlassPrecision(5))
    assert update_alike(BinaryAUROC(max_fpr=0.5), BinaryAveragePrecision())
    assert update_alike(RetrievalPrecision(top_k=2), RetrievalMRR())


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


class Upwards(Counting):
    def update(self) -> None:
        super().update()


def test_metrics_of_a_users_own_share_only_where_all_they_are_made_of_is_equal() -> None:
    for kind in (Counting, Looking, Upwards):
        assert update_alike(kind(1), kind(1))
        assert not update_alike(kind(1), kind(2))
    assert not update_alike(Counting(1), Looking(1))


class Above(Metric):
    """How many scores are above a threshold; what it counts of some batches, other thresholds count too."""

    full_state_update = False
    n: torch.Tensor

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.add_state("n", torch.tensor(0), "sum")

    def update(self, preds: torch.Tensor) -> None:
        self.n += (preds > self.threshold).sum()

    def compute(self) -> torch.Tensor:
        return self.n


def low_and_high() -> MetricCollection:
    return MetricCollection({"low": Above(0.1), "high": Above(0.9)})


def test_members_that_agree_on_one_ranks_first_batch_by_chance_stay_apart() -> None:
    alike, apart = torch.tensor([0.95, 0.05]), torch.tensor([0.5, 0.2])
    found = over_ranks(lambda: {"c": low_and_high()}, [[alike, apart], [apart, alike]])
    assert [(int(rank["c/low"]), int(rank["c/high"])) for rank in found] == [(6, 2)] * 2


def test_a_collection_used_before_is_grouped_anew_and_keeps_what_it_counted() -> None:
    collection = low_and_high()
    leaders = leaders_of([collection])
    collection.update(torch.tensor([0.95]))
    assert len(collection.compute_groups) == 1
    apply_compute_groups(collection, leaders)
    collection.update(torch.tensor([0.5]))
    assert {name: int(value) for name, value in collection.compute().items()} == {"low": 2, "high": 1}


def test_a_collection_over_ranks_is_fed_in_the_groups_that_travel() -> None:
    collection = MetricCollection([MulticlassPrecision(3), MulticlassRecall(3), MulticlassConfusionMatrix(3)])
    apply_compute_groups(collection, leaders_of([collection]))
    assert list(collection.compute_groups.values()) == [
        ["MulticlassPrecision", "MulticlassRecall"],
        ["MulticlassConfusionMatrix"],
    ]


def test_one_member_under_two_names_holds_its_states_once() -> None:
    one = Above(0.5)
    found = on_one(lambda: {"c": MetricCollection({"a": one, "b": one})}, [torch.tensor([0.9, 0.1])])
    assert {name: int(value) for name, value in found.items()} == {"c/a": 1, "c/b": 1}


def test_groups_given_with_a_later_member_first_are_led_by_it() -> None:
    names = [["MulticlassRecall", "MulticlassPrecision"]]
    collection = MetricCollection([MulticlassPrecision(3), MulticlassRecall(3)], compute_groups=names)
    apply_compute_groups(collection, leaders_of([collection]))
    assert list(collection.compute_groups.values()) == names


class Learning(Metric):
    """Keeps what its update found out beside the state."""

    full_state_update = False
    n: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kind: torch.dtype | None = None
        self.add_state("n", torch.tensor(0), "sum")

    def update(self, preds: torch.Tensor) -> None:
        self.n += len(preds)
        self.kind = preds.dtype

    def compute(self) -> torch.Tensor:
        assert self.kind is not None
        return self.n.to(self.kind)


class LearningToo(Learning):
    def compute(self) -> torch.Tensor:
        return -super().compute()


def test_a_member_that_is_not_fed_has_what_its_leader_learnt() -> None:
    def make() -> dict[str, MetricCollection]:
        return {"c": MetricCollection([Learning(), LearningToo()])}

    data = [torch.ones(2), torch.ones(3)]
    for found in (on_one(make, data), over_ranks(make, [data, []])[1]):
        assert [float(value) for value in found.values()] == [5.0, -5.0]


def count_above(metric: Above, preds: torch.Tensor) -> None:
    metric.n += (preds > metric.threshold).sum()


class Decorated(Above):
    @torch.no_grad()
    def update(self, preds: torch.Tensor) -> None:
        self.n += (preds > self.threshold).sum()


class Handing(Above):
    """Its update hands the metric to a function, so that its own code does not show what is read."""

    def update(self, preds: torch.Tensor) -> None:
        count_above(self, preds)


class Low(Handing):
    limit = 0.1


class High(Handing):
    limit = 0.9


@pytest.mark.parametrize("kind", [Decorated, Handing])
def test_an_update_that_hands_its_metric_on_shares_only_between_equal_metrics(kind: type[Above]) -> None:
    def make() -> dict[str, MetricCollection]:
        return {"c": MetricCollection({"low": kind(0.1), "high": kind(0.9)})}

    data = torch.tensor([0.5, 0.2, 0.95])
    for found in (on_one(make, [data]), over_ranks(make, [[data], []])[1]):
        assert {name: int(value) for name, value in found.items()} == {"c/low": 3, "c/high": 1}
    assert update_alike(kind(0.1), kind(0.1))


def test_classes_that_differ_in_more_than_their_compute_do_not_share() -> None:
    assert not update_alike(Low(0.1), High(0.1))
    assert update_alike(Learning(), LearningToo())


def test_what_updates_learnt_does_not_change_who_shares() -> None:
    made = Metrics({"c": MetricCollection([Learning(), LearningToo()])})
    engine = Engine(take, coordinator=Alone())
    made.attach(engine)
    engine.run([torch.ones(2)])
    assert [int(saved["states"]["n"]) for saved in made.state_dict().values()] == [2, 2]
    made.detach()
    made.attach(engine)
    engine.run([torch.ones(3)])
    assert [float(value) for value in engine.state.metrics.values()] == [3.0, -3.0]


def test_members_of_several_collections_share_with_all_of_these() -> None:
    one, other, third = Counting(1), Counting(1), Counting(1)
    made = {
        "a": MetricCollection({"x": one, "y": other}),
        "b": MetricCollection({"x": other, "y": one}),
        "c": MetricCollection({"x": third, "y": other}),
    }
    assert len(leaders_of(made.values())) == 2
    found = on_one(lambda: made, [(), ()])
    assert [int(value) for value in found.values()] == [2] * 6
