"""Attaching, feeding, usages, errors: over simulated ranks and alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torchmetrics import Metric, MetricCollection, MetricTracker
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric, Running

from allstep import Alone, Coordinator, Engine, Events
from allstep.errors import MetricError, MetricMismatchError, NotComputableError
from allstep.metrics import EPOCH, ITERATION, RUNNING, Max, Mean, Metrics, Sum, Usage
from allstep.testing import simulate
from tests.metrics.worlds import all_same_bits, deal, on_one, over_ranks, same_bits, take


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(n, 4, generator=generator), torch.randint(4, (n,), generator=generator)) for n in sizes]


def alone(metrics: Metrics, data: list[Any], epochs: int = 1, **attach: Any) -> Engine:
    engine = Engine(take, coordinator=Alone())
    metrics.attach(engine, **attach)
    engine.run(data, max_epochs=epochs)
    return engine


class Noting(Metric):
    """Counts its updates and notes what it was given."""

    full_state_update = False
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []
        self.add_state("count", torch.tensor(0), "sum")

    def update(self, preds: Any, target: Any = None) -> None:
        self.given.append((preds, target))
        self.count += 1

    def compute(self) -> torch.Tensor:
        return self.count


def test_results_are_in_the_state_at_the_epochs_end_for_handlers_added_later() -> None:
    engine = Engine(take, coordinator=Alone())
    Metrics({"accuracy": MulticlassAccuracy(4)}).attach(engine)
    seen: list[Any] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(e.state.metrics["accuracy"]))
    engine.run(batches(3, 2), max_epochs=2)
    assert len(seen) == 2
    assert isinstance(seen[0], torch.Tensor)


def test_each_metric_takes_a_batch_once_however_often_arithmetic_names_it() -> None:
    one, other = Noting(), Noting()
    f1 = one * other * 2 / (one + other)
    engine = alone(Metrics({"one": one, "f1": f1}), [1, 2, 3])
    assert int(engine.state.metrics["one"]) == 3
    assert len(one.given) == len(other.given) == 3


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


def test_a_mapping_gives_each_metric_the_arguments_that_it_knows() -> None:
    metric = Noting()
    alone(
        Metrics({"it": metric, "loss": Mean()}),
        [torch.ones(2)],
        output_transform=lambda x: {"target": 1, "preds": 2, "value": x, "more": 3},
    )
    assert metric.given == [(2, 1)]


def test_metrics_may_have_transforms_of_their_own() -> None:
    metric = Noting()
    engine = alone(
        Metrics({"it": metric, "loss": Mean()}),
        batches(2),
        output_transform={"it": lambda o: (o[1].tolist(),), "loss": lambda o: o[0].mean()},
    )
    assert len(metric.given[0][0]) == 2
    assert 0 < float(engine.state.metrics["loss"]) < 1


def test_an_output_that_the_transform_leaves_out_enters_no_metric() -> None:
    engine = alone(Metrics({"n": Noting()}), [1, 2, 3, 4], output_transform=lambda x: None if x % 2 else x)
    assert int(engine.state.metrics["n"]) == 2


def test_collections_keep_their_names() -> None:
    def collection() -> MetricCollection:
        return MetricCollection([MulticlassAccuracy(4), MulticlassF1Score(4)], prefix="val_")

    named = alone(Metrics({"digits": collection()}), batches(3))
    bare = alone(Metrics(collection()), batches(3))
    assert list(named.state.metrics) == ["digits/val_MulticlassAccuracy", "digits/val_MulticlassF1Score"]
    assert list(bare.state.metrics) == ["val_MulticlassAccuracy", "val_MulticlassF1Score"]


@pytest.mark.parametrize("groups", [True, False, [["MulticlassPrecision", "MulticlassRecall"]]])
def test_a_collection_over_ranks_equals_one_process_with_a_rank_that_saw_nothing(groups: Any) -> None:
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


def values_at(event: Any, usage: Any, data: list[Any], epochs: int) -> list[float]:
    engine = Engine(take, coordinator=Alone())
    Metrics({"sum": Sum(weighted=False)}).attach(engine, usage=usage)
    seen: list[float] = []
    engine.add_event_handler(event, lambda e: seen.append(float(e.state.metrics["sum"])))
    engine.run(data, max_epochs=epochs)
    return seen


def test_usages_begin_and_compute_where_they_say() -> None:
    data = [1.0, 2.0, 4.0]
    every = Events.ITERATION_COMPLETED
    assert values_at(Events.EPOCH_COMPLETED, "epoch", data, 2) == [7.0, 7.0]
    assert values_at(every, "running", data, 2) == [1.0, 3.0, 7.0, 1.0, 3.0, 7.0]
    assert values_at(every, "iteration", data, 2) == [1.0, 2.0, 4.0, 1.0, 2.0, 4.0]
    assert values_at(Events.COMPLETED, "run", data, 2) == [14.0]
    assert values_at(every(every=2), RUNNING.every(2), data, 2) == [3.0, 1.0, 7.0]
    assert values_at(Events.EPOCH_COMPLETED, EPOCH.only(every(every=2)), data, 2) == [2.0, 5.0]
    assert values_at(Events.EPOCH_COMPLETED, Usage(resets=Events.STARTED), data, 2) == [7.0, 14.0]


def test_what_is_computed_after_each_iteration_and_fed_at_some_is_computed_at_those() -> None:
    data, every = [1.0, 2.0, 4.0, 8.0], Events.ITERATION_COMPLETED
    assert values_at(every(every=2), RUNNING.only(every(every=2)), data, 2) == [2.0, 10.0, 2.0, 10.0]
    assert values_at(every(every=2), ITERATION.only(every(every=2)), data, 1) == [2.0, 8.0]
    assert values_at(every(every=3), RUNNING.only(every(once=[2, 3])), data, 1) == [6.0]
    assert RUNNING.only(every(every=2)).every(4).computes == RUNNING.every(4).only(every(every=2)).computes
    assert EPOCH.only(every(every=2)).computes is EPOCH.computes


def test_a_filter_that_may_depend_on_the_rank_does_not_say_where_ranks_compute() -> None:
    chosen = Events.ITERATION_COMPLETED(event_filter=lambda engine, count: count > 1)
    with pytest.raises(NotComputableError, match="`computes` needs the same filter"):
        values_at(Events.ITERATION_COMPLETED, RUNNING.only(chosen), [1.0, 2.0], 1)
    both = Usage(updates=chosen, computes=chosen)
    assert values_at(Events.EPOCH_COMPLETED, both, [1.0, 2.0, 4.0], 1) == [6.0]


def test_usages_over_ranks_take_those_that_have_a_batch() -> None:
    def rank(coordinator: Coordinator) -> list[float]:
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        Metrics({"now": Sum(weighted=False)}).attach(engine, usage="iteration")
        Metrics({"far": Sum(weighted=False), "most": Max()}).attach(engine, usage="running")
        seen: list[float] = []
        engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e: seen.extend(float(e.state.metrics[k]) for k in ("now", "far", "most"))
        )
        engine.run([1.0, 2.0, 4.0] if coordinator.rank else [10.0], max_epochs=1)
        return seen

    assert simulate(rank, 2) == [[11.0, 11.0, 10.0, 2.0, 13.0, 10.0, 4.0, 17.0, 10.0]] * 2


def test_a_filler_enters_no_metric() -> None:
    def rank(coordinator: Coordinator) -> int:
        engine = Engine(take, coordinator=coordinator)
        Metrics({"n": Noting()}).attach(engine)
        engine.run([1] * (5 - 3 * coordinator.rank), uneven="longest")
        return int(engine.state.metrics["n"])

    assert simulate(rank, 2) == [7, 7]


def test_a_metric_that_has_seen_nothing_anywhere_is_the_same_error_on_all_ranks() -> None:
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


class Learning(Noting):
    """Keeps an attribute that only an update sets."""

    def update(self, preds: Any, target: Any = None) -> None:
        super().update(preds, target)
        self.kind = torch.float16

    def compute(self) -> torch.Tensor:
        return self.count.to(self.kind)


def test_what_updates_learnt_beside_states_reaches_a_rank_that_saw_nothing() -> None:
    found = over_ranks(lambda: {"it": Learning()}, [[], [1, 2], [1]])
    assert [rank["it"].dtype for rank in found] == [torch.float16] * 3
    assert all_same_bits(found)


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


def test_a_state_that_changes_its_shape_on_one_rank_during_a_run_is_an_error_on_all() -> None:
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


class SyncsItself(Noting):
    """Reduces in a way of its own: `times` gathers."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        for _ in range(self.times):
            self.count = torch.stack(dist_sync_fn(self.count, process_group)).amax(0)


def test_a_metric_with_a_way_of_its_own_is_reduced_in_it_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "allstep.engine"):
        found = over_ranks(lambda: {"own": SyncsItself(2), "n": Noting()}, [[1] * 4, [1], [1, 2]])
    assert [(int(rank["own"]), int(rank["n"])) for rank in found] == [(4, 7)] * 3
    assert "metric own (SyncsItself) reduces its states in a way of its own" in caplog.text


def test_a_way_of_its_own_that_gathers_unequally_is_an_error_on_all_ranks() -> None:
    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator)
        Metrics({"own": SyncsItself(1 + coordinator.rank)}).attach(engine)
        with pytest.raises(MetricMismatchError) as caught:
            engine.run([1])
        return str(caught.value)

    errors = simulate(rank, 3)
    assert errors == [errors[0]] * 3
    assert "metric 'own' (SyncsItself)" in errors[0]
    assert "on rank 0" in errors[0]


def test_a_way_of_its_own_that_fails_on_one_rank_is_an_error_on_all() -> None:
    class Failing(SyncsItself):
        def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
            if self.count == 2:
                raise OSError("broken")
            super()._sync_dist(dist_sync_fn, process_group)

    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        metric = Failing(1)
        Metrics({"own": metric}).attach(engine)
        with pytest.raises(MetricError) as caught:
            engine.run([1] * (1 + coordinator.rank))
        assert int(metric.count) == 1 + coordinator.rank
        return str(caught.value)

    errors = simulate(rank, 2)
    assert errors == [errors[0]] * 2
    assert "rank 1: OSError('broken')" in errors[0]


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
    assert len(engine.reductions[0].members) == 1  # type: ignore[attr-defined]
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


def test_a_usage_may_compute_and_begin_at_several_events() -> None:
    engine = Engine(take, coordinator=Alone())
    both = Usage(resets=Events.STARTED | Events.EPOCH_STARTED, computes=Events.EPOCH_COMPLETED | Events.COMPLETED)
    metrics = Metrics({"n": Noting()}).attach(engine, usage=both)
    seen: list[int] = []
    for event in (Events.EPOCH_COMPLETED, Events.COMPLETED):
        engine.add_event_handler(event, lambda e: seen.append(int(e.state.metrics["n"])))
    engine.run([1, 2], max_epochs=2)
    assert seen == [2, 2, 2]
    assert len(engine.reductions) == 2
    metrics.detach()
    assert engine.reductions == []


def test_a_batch_is_fed_at_one_event_only_and_at_nothing_else_than_an_event() -> None:
    engine, every = Engine(take, coordinator=Alone()), Events.ITERATION_COMPLETED
    with pytest.raises(ValueError, match="counted twice"):
        Metrics({"n": Noting()}).attach(engine, usage=EPOCH.only(every(every=2) | every(every=3)))
    with pytest.raises(TypeError, match="computes is 'epoch'"):
        Metrics({"n": Noting()}).attach(engine, usage=Usage(computes="epoch"))  # type: ignore[arg-type]
    assert engine.reductions == []


def test_a_tracker_says_what_to_do_instead() -> None:
    with pytest.raises(TypeError, match=r"'t' is a MetricTracker.*engine\.state\.metrics"):
        Metrics({"t": MetricTracker(MulticlassAccuracy(4))})  # type: ignore[dict-item]


class CountingAside(Noting):
    """Counts in attributes that are no states."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.total = torch.tensor(0.0)
        self.kind: torch.dtype | None = None
        self.ready = False

    def update(self, preds: Any, target: Any = None) -> None:
        super().update(preds, target)
        self.seen += 1
        self.total += 1
        self.kind, self.ready = torch.float32, True


def test_what_is_counted_outside_of_states_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def rank(coordinator: Coordinator) -> None:
        engine = Engine(take, coordinator=coordinator)
        Metrics({"it": CountingAside(), "range": MinMaxMetric(Noting())}).attach(engine, usage="running")
        engine.run([1, 2, 3])

    simulate(rank, 2)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2  # one a rank
    assert "metric it (CountingAside): its update changes seen, total, which is no state" in said[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
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
    assert engine.reductions == []
    metrics.attach(engine)
    engine.run([1])
    assert int(engine.state.metrics["n"]) == 1


def test_an_interrupted_epoch_is_counted_on() -> None:
    engine = Engine(take, coordinator=Alone())
    Metrics({"n": Noting()}).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.interrupt())
    engine.run([1, 2, 3, 4])
    assert "n" not in engine.state.metrics
    engine.run([1, 2, 3, 4])
    assert int(engine.state.metrics["n"]) == 4


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
