"""Attaching and detaching: names, several of them, options, refusals."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from torchmetrics import MetricCollection, MetricTracker
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.wrappers import ClasswiseWrapper

from allstep import Alone, Engine, Events
from allstep.coordination import Coordinator
from allstep.errors import MetricError
from allstep.metrics import Metrics
from allstep.testing import simulate
from tests.metrics.noting import Noting, alone, batches
from tests.metrics.worlds import on_one, over_ranks, take


def test_several_metrics_objects_at_one_event_are_reduced_together() -> None:
    def rank(coordinator: Any, count: int) -> int:
        engine = Engine(take, coordinator=coordinator)
        for at in range(count):
            Metrics({f"m{at}": Noting()}).attach(engine)
        before = coordinator.calls
        engine.run([1])
        return int(coordinator.calls - before)

    taken = [simulate(rank, 2, count)[0] for count in (0, 1, 3)]
    assert taken[1] == taken[2] == taken[0] + 1


def test_a_name_is_computed_once_at_an_event() -> None:
    engine = Engine(take, coordinator=Alone())
    Metrics({"n": Noting()}).attach(engine)
    with pytest.raises(ValueError, match="named n"):
        Metrics({"n": Noting()}).attach(engine)
    Metrics({"n": Noting()}).attach(engine, usage="iteration")


def test_two_collections_given_alone_are_computed_at_one_event() -> None:
    def make(prefix: str) -> Metrics:
        return Metrics(MetricCollection([MulticlassAccuracy(4), MulticlassF1Score(4)], prefix=prefix))

    engine = Engine(take, coordinator=Alone())
    make("val_").attach(engine)
    make("other_").attach(engine)
    engine.run(batches(3))
    assert len(engine.state.metrics) == 4


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({"c/a": Noting()}, {"c": MetricCollection({"a": Noting()})}, "Noting 'c/a' and of MetricCollection 'c'"),
        (
            MetricCollection({"a": Noting()}),
            MetricCollection({"b": Noting(), "a": Noting()}),
            r"MetricCollection\(a\) and of MetricCollection\(a, b\)",
        ),
        ({"va": Noting()}, MetricCollection({"a": Noting()}, prefix="v"), r"Noting 'va' and of MetricCollection\(a\)"),
    ],
    ids=["an entry", "two alone", "a prefix"],
)
def test_two_results_with_one_name_are_refused_and_both_are_named(first: Any, second: Any, told: str) -> None:
    engine = Engine(take, coordinator=Alone())
    Metrics(first).attach(engine)
    with pytest.raises(ValueError, match=f"two results named .* at EPOCH_COMPLETED: of {told}"):
        Metrics(second).attach(engine)
    assert len(engine.extension.reductions[0].members) == 1  # type: ignore[attr-defined]
    engine.run([1])


def test_names_that_only_a_result_tells_are_an_error_when_it_is_computed() -> None:
    def by_class() -> MetricCollection:
        return MetricCollection([ClasswiseWrapper(MulticlassAccuracy(4, average=None))])

    engine = Engine(take, coordinator=Alone())
    Metrics(by_class()).attach(engine)
    accuracy = {"multiclassaccuracy_0": MulticlassAccuracy(4)}
    Metrics(accuracy).attach(engine)
    with pytest.raises(MetricError, match="'metrics' and 'multiclassaccuracy_0' both give a result named"):
        engine.run(batches(3))


def test_a_tracker_says_what_to_do_instead() -> None:
    with pytest.raises(TypeError, match=r"'t' is a MetricTracker.*engine\.state\.metrics"):
        Metrics({"t": MetricTracker(MulticlassAccuracy(4))})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dist_sync_fn": print}, "metric it (MulticlassAccuracy) has a dist_sync_fn, which is not called"),
        ({"process_group": object()}, "metric it (MulticlassAccuracy) has a process_group"),
        ({"sync_on_compute": False}, "metric it (MulticlassAccuracy) has sync_on_compute=False"),
        ({"dist_sync_on_step": True}, "metric it (MulticlassAccuracy) has dist_sync_on_step=True"),
    ],
)
def test_options_of_torchmetrics_own_reduction_that_have_no_effect_are_noted(
    options: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "allstep.engine"):
        over_ranks(lambda: {"it": MulticlassAccuracy(4, **options)}, [batches(3), batches(2)])
    assert told in caplog.text
    caplog.clear()
    alone(Metrics({"it": MulticlassAccuracy(4, **options)}), batches(3))
    assert told not in caplog.text


def test_attaching_twice_during_a_run_or_what_is_no_metric_is_refused() -> None:
    engine = Engine(take, coordinator=Alone())
    metrics = Metrics({"n": Noting()}).attach(engine)
    with pytest.raises(MetricError, match="attached already"):
        metrics.attach(engine)
    late = Metrics({"late": Noting()})
    engine.add_event_handler(Events.STARTED, lambda e: late.attach(e))
    with pytest.raises(MetricError, match="running"):
        engine.run([1])
    with pytest.raises(TypeError, match="'x' is 3"):
        Metrics({"x": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="'often'"):
        late.attach(engine, usage="often")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names more"):
        late.attach(engine, {"more": lambda o: o})


def test_detached_metrics_are_left_alone() -> None:
    engine = Engine(take, coordinator=Alone())
    metrics = Metrics({"n": Noting()}).attach(engine)
    engine.run([1, 2])
    metrics.detach()
    engine.run([1])
    assert int(engine.state.metrics["n"]) == 2
    assert engine.extension.reductions == []
    metrics.attach(engine)
    engine.run([1])
    assert int(engine.state.metrics["n"]) == 1


class SyncsItself(Noting):
    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        self.count = torch.stack(dist_sync_fn(self.count, process_group)).amax(0)


def test_a_metric_that_overrides_the_reduction_is_refused_over_ranks() -> None:
    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator)
        with pytest.raises(MetricError) as caught:
            Metrics({"n": Noting(), "own": 2 * SyncsItself()}).attach(engine)
        Metrics({"n": Noting()}).attach(engine)
        engine.run([1])
        assert int(engine.state.metrics["n"]) == 2
        return str(caught.value)

    errors = simulate(rank, 2)
    assert errors == [errors[0]] * 2
    assert errors[0].startswith("metric 'own.metric_b' (SyncsItself) overrides _sync_dist")
    assert "dist_reduce_fx" in errors[0]


def test_a_metric_that_overrides_the_reduction_is_computed_by_one_rank() -> None:
    engine = alone(Metrics({"own": SyncsItself()}), [1, 2])
    assert int(engine.state.metrics["own"]) == 2


def test_a_dist_sync_fn_is_not_called_and_the_result_is_that_of_all() -> None:
    def fail(tensor: torch.Tensor, group: Any = None) -> Any:
        raise AssertionError("it is not called")

    for groups in (True, [["MulticlassPrecision", "MulticlassRecall"]]):

        def make(groups: Any = groups, **options: Any) -> dict[str, MetricCollection]:
            members = [MulticlassPrecision(4, **options), MulticlassRecall(4, **options)]
            return {"c": MetricCollection(members, compute_groups=groups)}

        single = on_one(make, [*batches(3), *batches(2)])
        found = over_ranks(partial(make, dist_sync_fn=fail), [batches(3), batches(2)])
        assert found == [single, single]
