"""Saved on some ranks, loaded on others: what was counted is counted once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision, MulticlassAccuracy
from torchmetrics.regression import PearsonCorrCoef, R2Score
from torchmetrics.wrappers import MinMaxMetric

from allstep import Alone, Engine, Events
from allstep.coordination import Coordinator
from allstep.metrics import Max, Mean, Metrics, Sum
from allstep.testing import simulate
from tests.metrics.worlds import all_same_bits, deal, on_one, same_bits, take


class Averaged(Metric):
    """A tensor state that is averaged over those that saw something."""

    full_state_update = False
    value: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("value", torch.tensor(0.0), "mean")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.value = self.value * 0 + preds.max()

    def compute(self) -> torch.Tensor:
        return self.value


def make() -> dict[str, Metric]:
    return {
        "accuracy": MulticlassAccuracy(2),
        "auroc": BinaryAUROC(),
        "pearson": PearsonCorrCoef(),
        "averaged": Averaged(),
        "mean": Mean(),
        "max": Max(),
        "sum": Sum(),
    }


def transform(batch: Any) -> Any:
    scores, target = batch
    return {"preds": scores, "target": target, "value": scores}


TRANSFORMS = {
    "accuracy": lambda b: ((b[0] > 0.5).long(), b[1]),
    "pearson": lambda b: (b[0], b[1].float()),
    "auroc": transform,
    "averaged": transform,
    "mean": lambda b: b[0],
    "max": lambda b: b[0],
    "sum": lambda b: b[0],
}


def batches(count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.rand(5, generator=generator), torch.randint(2, (5,), generator=generator)) for _ in range(count)]


def saved(dealt: list[list[Any]]) -> list[dict[str, Any]]:
    """What each rank saves in the middle of an epoch."""

    def rank(coordinator: Coordinator) -> dict[str, Any]:
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        metrics = Metrics(make()).attach(engine, TRANSFORMS)
        states: list[dict[str, Any]] = []
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: states.append(metrics.state_dict()))
        engine.run(dealt[coordinator.rank])
        return states[0]

    return simulate(rank, len(dealt))


@pytest.mark.parametrize("now", [1, 2, 3, 4, 5])
def test_states_of_three_ranks_are_gone_on_with_on_any_number(now: int) -> None:
    states = saved(deal(batches(9), 3))
    expected = saved_results(states, 3)

    def rank(coordinator: Coordinator) -> dict[str, Any]:
        engine = Engine(take, coordinator=coordinator)
        metrics = Metrics(make()).attach(engine, TRANSFORMS)
        metrics.load_state_dict(states)
        engine.extension.reductions[0](engine)  # type: ignore[operator]
        return dict(engine.state.metrics)

    found = simulate(rank, now) if now > 1 else [rank(Alone())]
    assert all_same_bits(found)
    for name, value in expected.items():
        torch.testing.assert_close(found[0][name], value)


def saved_results(states: list[dict[str, Any]], world_size: int) -> dict[str, Any]:
    def rank(coordinator: Coordinator) -> dict[str, Any]:
        engine = Engine(take, coordinator=coordinator)
        Metrics(make()).attach(engine, TRANSFORMS).load_state_dict(states[coordinator.rank])
        engine.extension.reductions[0](engine)  # type: ignore[operator]
        return dict(engine.state.metrics)

    return simulate(rank, world_size)[0]


def test_what_was_loaded_and_what_comes_after_is_all_samples() -> None:
    data = batches(9)
    states = saved(deal(data[:5], 3))
    rest = deal(data[5:], 2)

    def rank(coordinator: Coordinator) -> dict[str, Any]:
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        metrics = Metrics(make()).attach(engine, TRANSFORMS)
        metrics.load_state_dict(states)
        engine.load_state_dict({"iteration": 2, "epoch_length": 2 + max(map(len, rest)), "max_epochs": 1})
        engine.run([None, None, *rest[coordinator.rank]])
        return dict(engine.state.metrics)

    found = simulate(rank, 2)
    single = on_one(make, data, TRANSFORMS)
    assert all_same_bits(found)
    for name in ("accuracy", "auroc", "pearson", "mean", "max", "sum"):
        torch.testing.assert_close(found[0][name], single[name])


def test_saving_again_what_was_loaded_keeps_it() -> None:
    states = saved(deal(batches(9), 3))
    engine = Engine(take, coordinator=Alone())
    metrics = Metrics(make()).attach(engine, TRANSFORMS)
    metrics.load_state_dict(states)
    again = metrics.state_dict()
    metrics.reset()
    metrics.load_state_dict(again)
    engine.extension.reductions[0](engine)  # type: ignore[operator]
    for name, value in saved_results(states, 3).items():
        torch.testing.assert_close(engine.state.metrics[name], value)


def in_an_epoch(coordinator: Coordinator, metrics: Metrics, state: Any, *, before: bool) -> dict[str, Any]:
    """Results of what was loaded, before or after `attach`."""
    engine = Engine(take, coordinator=coordinator)
    if before:
        metrics.load_state_dict(state)
    metrics.attach(engine, TRANSFORMS)
    if not before:
        metrics.load_state_dict(state)
    engine.extension.reductions[0](engine)  # type: ignore[operator]
    return dict(engine.state.metrics)


@pytest.mark.parametrize("before", [True, False], ids=["before attach", "after"])
@pytest.mark.parametrize("now", [1, 2, 4])
def test_states_of_all_ranks_are_counted_once_whenever_they_are_loaded(now: int, before: bool) -> None:
    states = saved(deal(batches(9), 3))
    expected = saved_results(states, 3)
    found = simulate(lambda c: in_an_epoch(c, Metrics(make()), states, before=before), now)
    assert all_same_bits(found)
    for name, value in expected.items():
        torch.testing.assert_close(found[0][name], value)


def test_what_one_rank_saved_is_gone_on_with_before_attach_too() -> None:
    states = saved(deal(batches(9), 2))
    expected = saved_results(states, 2)
    found = simulate(lambda c: in_an_epoch(c, Metrics(make()), states[c.rank], before=True), 2)
    for name, value in expected.items():
        torch.testing.assert_close(found[0][name], value)


class Learning(Averaged):
    """Keeps beside its state what its updates found out."""

    def __init__(self) -> None:
        super().__init__()
        self.kind: torch.dtype | None = None
        self.seen = 0
        self.last = torch.zeros(())

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        super().update(preds, target)
        self.kind = torch.float16
        self.seen += 1
        self.last = preds[-1]

    def compute(self) -> torch.Tensor:
        assert self.kind is not None
        return self.value.to(self.kind) + self.seen + self.last


def with_attributes() -> dict[str, Any]:
    members = [BinaryAUROC(), BinaryAveragePrecision()]
    return {"learnt": Learning(), "range": MinMaxMetric(MulticlassAccuracy(2)), "c": MetricCollection(members)}


ATTRIBUTES = {
    "learnt": transform,
    "range": lambda b: ((b[0] > 0.5).long(), b[1]),
    "c": transform,
}


def running(engine: Engine, metrics: Metrics, data: list[Any]) -> dict[str, Any]:
    metrics.attach(engine, ATTRIBUTES, "running")
    engine.run(data)
    return dict(engine.state.metrics)


def test_a_state_holds_attributes_extremes_of_results_and_all_members() -> None:
    data = batches(6)
    whole = running(Engine(take, coordinator=Alone()), Metrics(with_attributes()), data)
    first = Metrics(with_attributes())
    running(Engine(take, coordinator=Alone()), first, data[:3])
    state = first.state_dict()
    assert state["range"]["learnt"].keys() == {"min_val", "max_val"}
    assert len(state["c.BinaryAveragePrecision"]["states"]["preds"]) == 3
    second = Metrics(with_attributes())
    second.load_state_dict(state)
    engine = Engine(take, coordinator=Alone())
    engine.load_state_dict({"iteration": 3, "epoch_length": 6, "max_epochs": 1})
    assert same_bits(running(engine, second, data), whole)


def test_extremes_are_loaded_by_every_rank_of_a_larger_world() -> None:
    data = batches(4)
    first = Metrics(with_attributes())
    results = running(Engine(take, coordinator=Alone()), first, data)["range"]
    state = first.state_dict()

    def rank(coordinator: Coordinator) -> dict[str, Any]:
        engine = Engine(take, coordinator=coordinator)
        metrics = Metrics(with_attributes()).attach(engine, ATTRIBUTES, "running")
        metrics.load_state_dict([state])
        engine.extension.reductions[0](engine)  # type: ignore[operator]
        return dict(engine.state.metrics["range"])

    found = simulate(rank, 3)
    assert all_same_bits(found)
    assert same_bits(found[0], results)


def test_loading_takes_back_what_updates_set_since() -> None:
    metrics = Metrics(with_attributes())
    empty = metrics.state_dict()
    running(Engine(take, coordinator=Alone()), metrics, batches(2))
    metrics.load_state_dict(empty)
    learnt, wrapper = metrics.entries["learnt"], metrics.entries["range"]
    assert (learnt.kind, learnt.seen, float(learnt.last)) == (None, 0, 0.0)
    assert (float(wrapper.min_val), float(wrapper.max_val)) == (float("inf"), float("-inf"))


def test_metrics_attached_later_do_not_take_from_others_what_they_learnt() -> None:
    engine = Engine(take, coordinator=Alone())
    first = Metrics({"learnt": Learning()}).attach(engine, transform)
    engine.run(batches(2))
    Metrics({"mean": Mean()}).attach(engine, lambda b: b[0])
    assert first.state_dict()["learnt"]["learnt"].keys() == {"kind", "seen", "last"}


def test_a_saved_state_is_a_copy_and_loading_asks_nobody() -> None:
    metrics = Metrics({"mean": Mean()})
    state = metrics.state_dict()
    metrics.entries["mean"].update(3.0, 1)
    assert float(state["mean"]["states"]["total"]) == 0.0
    metrics.load_state_dict(state)
    assert float(metrics.entries["mean"].total) == 0.0


def test_a_state_shaped_by_its_first_batch_is_loaded_by_a_metric_without_one() -> None:
    generator = torch.Generator().manual_seed(7)
    data = [(torch.rand(4, 2, generator=generator), torch.rand(4, 2, generator=generator)) for _ in range(3)]
    metrics = Metrics({"r2": R2Score()})
    for batch in data:
        metrics.entries["r2"].update(*batch)
    states = [metrics.state_dict(), Metrics({"r2": R2Score()}).state_dict()]

    def rank(coordinator: Coordinator) -> float:
        engine = Engine(take, coordinator=coordinator)
        Metrics({"r2": R2Score()}).attach(engine).load_state_dict(states)
        engine.extension.reductions[0](engine)  # type: ignore[operator]
        return float(engine.state.metrics["r2"])

    for world_size in (1, 2, 3):
        found = simulate(rank, world_size)
        assert found == [pytest.approx(float(metrics.entries["r2"].compute()))] * world_size


def test_a_state_of_other_metrics_is_refused_and_changes_nothing() -> None:
    metrics = Metrics({"mean": Mean()})
    metrics.entries["mean"].update(3.0, 1)
    other = Metrics({"other": Mean()}).state_dict()
    with pytest.raises(ValueError, match="metrics other; these are mean"):
        metrics.load_state_dict(other)
    kind = {"mean": Metrics({"mean": Max()}).state_dict()["mean"]}
    with pytest.raises(ValueError, match="states total, residue, count; the state to load has value"):
        metrics.load_state_dict(kind)
    small, large = Metrics({"a": MulticlassAccuracy(3)}), Metrics({"a": MulticlassAccuracy(4)})
    with pytest.raises(ValueError, match=r"shape \(3,\); the state to load has \(4,\)"):
        small.load_state_dict(large.state_dict())
    assert float(metrics.entries["mean"].compute()) == 3.0
