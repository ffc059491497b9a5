"""Saved on some ranks, loaded on others: what was counted is counted once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy
from torchmetrics.regression import PearsonCorrCoef

from allstep import Alone, Coordinator, Engine, Events
from allstep.metrics import Max, Mean, Metrics
from allstep.testing import simulate
from tests.metrics.worlds import all_same_bits, deal, on_one, take


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
        engine.reductions[0](engine)  # type: ignore[operator]
        return dict(engine.state.metrics)

    found = simulate(rank, now) if now > 1 else [rank(Alone())]
    assert all_same_bits(found)
    for name, value in expected.items():
        torch.testing.assert_close(found[0][name], value)


def saved_results(states: list[dict[str, Any]], world_size: int) -> dict[str, Any]:
    def rank(coordinator: Coordinator) -> dict[str, Any]:
        engine = Engine(take, coordinator=coordinator)
        Metrics(make()).attach(engine, TRANSFORMS).load_state_dict(states[coordinator.rank])
        engine.reductions[0](engine)  # type: ignore[operator]
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
    for name in ("accuracy", "auroc", "pearson", "mean", "max"):
        torch.testing.assert_close(found[0][name], single[name])


def test_saving_again_what_was_loaded_keeps_it() -> None:
    states = saved(deal(batches(9), 3))
    engine = Engine(take, coordinator=Alone())
    metrics = Metrics(make()).attach(engine, TRANSFORMS)
    metrics.load_state_dict(states)
    again = metrics.state_dict()
    metrics.reset()
    metrics.load_state_dict(again)
    engine.reductions[0](engine)  # type: ignore[operator]
    for name, value in saved_results(states, 3).items():
        torch.testing.assert_close(engine.state.metrics[name], value)


def test_a_saved_state_is_a_copy_and_loading_asks_nobody() -> None:
    metrics = Metrics({"mean": Mean()})
    state = metrics.state_dict()
    metrics.entries["mean"].update(3.0, 1)
    assert float(state["mean"]["states"]["total"]) == 0.0
    metrics.load_state_dict(state)
    assert float(metrics.entries["mean"].total) == 0.0


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
