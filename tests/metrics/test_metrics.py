"""What `Metrics` computes of metrics, arithmetic, collections and wrappers; and that it leaves them as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric, Running

from allstep import Alone, Engine, Events
from allstep.coordination import Coordinator
from allstep.metrics import Mean, Metrics, Sum
from allstep.testing import simulate
from tests.metrics.noting import Noting, alone, batches
from tests.metrics.worlds import all_same_bits, deal, on_one, over_ranks, same_bits, take


def test_results_are_in_the_state_at_the_epochs_end_for_handlers_added_later() -> None:
    engine = Engine(take, coordinator=Alone())
    Metrics({"accuracy": MulticlassAccuracy(4)}).attach(engine)
    seen: list[Any] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(e.state.metrics["accuracy"]))
    engine.run(batches(3, 2), max_epochs=2)
    assert len(seen) == 2
    assert isinstance(seen[0], torch.Tensor)


def test_arithmetic_on_metrics_is_that_of_results_over_all_ranks() -> None:
    def make() -> dict[str, Metric]:
        p, r = MulticlassPrecision(4, average="micro"), MulticlassRecall(4, average="macro")
        return {"p": p, "r": r, "f1": p * r * 2 / (p + r), "loss": -abs(Mean() - 3)}

    def transforms(batch: Any) -> Any:
        return {"preds": batch[0], "target": batch[1], "value": batch[0].mean()}

    data = batches(3, 2, 5, 1, 4)
    found = over_ranks(make, deal(data, 3), transforms)
    single = on_one(make, data, transforms)
    assert all_same_bits(found)
    p, r = single["p"], single["r"]
    torch.testing.assert_close(single["f1"], 2 * p * r / (p + r))
    for name, value in single.items():
        torch.testing.assert_close(found[0][name], value)


def test_collections_keep_their_names() -> None:
    def collection() -> MetricCollection:
        return MetricCollection([MulticlassAccuracy(4), MulticlassF1Score(4)], prefix="val_")

    named = alone(Metrics({"digits": collection()}), batches(3))
    bare = alone(Metrics(collection()), batches(3))
    assert list(named.state.metrics) == ["digits/val_MulticlassAccuracy", "digits/val_MulticlassF1Score"]
    assert list(bare.state.metrics) == ["val_MulticlassAccuracy", "val_MulticlassF1Score"]


@pytest.mark.parametrize("groups", [True, False, [["MulticlassPrecision", "MulticlassRecall"]]])
def test_a_collection_equals_one_process_with_a_rank_that_saw_nothing(groups: Any) -> None:
    def make() -> dict[str, MetricCollection]:
        members = [MulticlassPrecision(4), MulticlassRecall(4), MulticlassF1Score(4), MulticlassAccuracy(4, top_k=2)]
        return {"c": MetricCollection(members, compute_groups=groups)}

    data = batches(3, 2, 5, 1, 4)
    single = on_one(make, data)
    for empty in (None, 0, 1):
        found = over_ranks(make, deal(data, 2, empty=empty))
        assert all_same_bits(found)
        for name, value in single.items():
            torch.testing.assert_close(found[0][name], value)


def test_wrappers_reduce_what_they_wrap() -> None:
    def make() -> dict[str, Metric]:
        return {
            "by class": ClasswiseWrapper(MulticlassAccuracy(4, average=None)),
            "range": MinMaxMetric(MulticlassAccuracy(4)),
        }

    data = batches(3, 2, 5, 1, 4)
    single, found = on_one(make, data), over_ranks(make, deal(data, 3, empty=1))
    assert all_same_bits(found)
    assert found[0]["by class"].keys() == single["by class"].keys()
    for name in single:
        for key, value in single[name].items():
            torch.testing.assert_close(found[0][name][key], value)


def test_a_running_window_wrapper_is_computed() -> None:
    found = over_ranks(
        lambda: {"last": Running(Sum(weighted=False), window=2)},
        [[torch.tensor(1.0)] * 3, [torch.tensor(10.0)] * 3],
        lambda batch: (batch,),
    )
    assert [float(rank["last"]) for rank in found] == [22.0, 22.0]


class Greatest(Metric):
    """A user's own: declares its states and how they reduce."""

    full_state_update = False
    count: torch.Tensor
    top: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("top", torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.count += len(target)
        self.top = torch.maximum(self.top, preds.max())

    def compute(self) -> dict[str, torch.Tensor]:
        return {"count": self.count, "top": self.top}


def test_a_metric_of_the_users_own_is_reduced_as_it_declares() -> None:
    data = batches(3, 2, 5, 1, 4)
    for found in over_ranks(lambda: {"own": Greatest()}, deal(data, 3)):
        assert int(found["own"]["count"]) == 15
        assert float(found["own"]["top"]) == max(float(x.max()) for x, _ in data)


class Raising(Noting):
    """Raises when it is computed, after it has spoilt its states."""

    def compute(self) -> torch.Tensor:
        self.count += 1000
        raise ArithmeticError("no result")


def test_states_are_those_of_the_rank_afterwards_also_when_compute_raises() -> None:
    def rank(coordinator: Coordinator) -> tuple[int, int, int]:
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        good, bad = Noting(), Raising()
        Metrics({"good": good, "bad": bad}).attach(engine)
        with pytest.raises(ArithmeticError, match="no result"):
            engine.run([1] * (1 + coordinator.rank))
        good.update(0)
        return int(good.count), int(bad.count), good.update_count

    assert simulate(rank, 2) == [(2, 1, 2), (3, 2, 3)]


def test_counting_goes_on_after_a_reduction() -> None:
    def rank(coordinator: Coordinator) -> list[int]:
        engine = Engine(take, coordinator=coordinator)
        Metrics({"n": Noting()}).attach(engine, usage="running")
        seen: list[int] = []
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(int(e.state.metrics["n"])))
        engine.run([1, 2, 3])
        return seen

    assert simulate(rank, 3) == [[3, 6, 9]] * 3


class Drawing(Noting):
    """Draws a random number when it is computed."""

    def compute(self) -> torch.Tensor:
        return torch.rand(3)


def test_random_numbers_in_compute_are_the_same_on_all_ranks_and_disturb_none() -> None:
    engine = Engine(take, coordinator=Alone())
    Metrics({"drawn": Drawing()}).attach(engine)
    torch.manual_seed(1)
    engine.run([1])
    first, after = engine.state.metrics["drawn"], torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    engine.run([1])
    assert torch.equal(engine.state.metrics["drawn"], first)


def test_lists_kept_on_the_host_are_computed_there() -> None:
    class Kept(Metric):
        full_state_update = False
        kept: list[torch.Tensor]

        def __init__(self) -> None:
            super().__init__(compute_on_cpu=True)
            self.add_state("kept", [], None)

        def update(self, value: float) -> None:
            self.kept.append(torch.tensor([value], device=self.device))

        def compute(self) -> torch.Tensor:
            return torch.cat(self.kept).sum()

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def rank(coordinator: Coordinator) -> torch.Tensor:
        engine = Engine(take, coordinator=coordinator)
        Metrics({"it": Kept()}).attach(engine, device=device)
        found: torch.Tensor = engine.run([1.0, 2.0]).metrics["it"]
        return found

    for found in simulate(rank, 2):
        assert found.device.type == "cpu"
        assert float(found) == 6.0


def test_results_are_the_same_bits_for_any_rank_and_equal_any_world_size() -> None:
    data = batches(*[3, 2, 5, 1, 4] * 3)

    def make() -> dict[str, Metric]:
        return {"a": MulticlassAccuracy(4), "loss": Mean()}

    def transform(batch: Any) -> Any:
        return {"preds": batch[0], "target": batch[1], "value": batch[0].mean()}

    single = on_one(make, data, transform)
    for world_size in (2, 3, 4):
        found = over_ranks(make, deal(data, world_size), transform)
        assert all_same_bits(found)
        assert same_bits(found[0]["a"], single["a"])
