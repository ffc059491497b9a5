"""A metric that `Feeding` feeds is afterwards what its own `update` makes of it, and costs no more."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchmetrics import MeanSquaredError, Metric, MetricCollection, R2Score
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassConfusionMatrix
from torchmetrics.wrappers import Running
from torchmetrics.wrappers.abstract import WrapperMetric

from allstep import Alone, Engine, Events
from allstep.metrics import Mean, Metrics
from tests.metrics.noting import batches
from tests.metrics.worlds import same_bits, take


def fed_by_engine(metric: Any, data: list[Any], **attach: Any) -> Engine:
    engine = Engine(take, coordinator=Alone())
    Metrics({"it": metric}).attach(engine, **attach)
    engine.run(data)
    return engine


def left(metric: Metric) -> dict[str, Any]:
    """What updates leave in a metric."""
    return {**metric.metric_state, "updates": metric.update_count}


class Adding(Metric):
    """Adds up what it is given, and does to it what a test says."""

    full_state_update = False
    total: torch.Tensor

    def __init__(self, act: Callable[[Adding], object] = lambda metric: None, **options: Any) -> None:
        super().__init__(**options)
        self.act = act
        self.add_state("total", torch.tensor(0.0), "sum")

    def update(self, value: torch.Tensor) -> None:
        self.total = self.total + value.sum()
        self.act(self)

    def compute(self) -> torch.Tensor:
        return self.total


class Decorated(Adding):
    @torch.no_grad()
    def update(self, value: torch.Tensor) -> None:
        self.total += value.sum()


scores = batches(5, 3, 1)
pairs = [(torch.rand(n), torch.randint(2, (n,))) for n in (4, 2)]


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: MulticlassAccuracy(4), scores),
        (lambda: MulticlassConfusionMatrix(4, validate_args=False), scores),
        (lambda: BinaryAUROC(), pairs),
        (lambda: BinaryAUROC(compute_on_cpu=True), pairs),
        (lambda: MeanSquaredError(), [(torch.rand(3), torch.rand(3))]),
        (lambda: R2Score(multioutput="raw_values"), [(torch.rand(3, 2), torch.rand(3, 2))]),
        (lambda: Adding(), [torch.ones(2), torch.ones(3)]),
        (lambda: Decorated(), [torch.ones(2), torch.ones(3)]),
        (lambda: Running(Adding(), 2), [torch.ones(2), torch.ones(3), torch.ones(4)]),
    ],
)
def test_a_fed_metric_holds_what_its_own_update_leaves(make: Callable[[], Metric], data: list[Any]) -> None:
    fed, by_hand = make(), make()
    fed_by_engine(fed, data)
    for batch in data:
        by_hand.update(*(batch if isinstance(batch, tuple) else (batch,)))
    assert fed.update_count == len(data)  # that of a wrapper too, which torchmetrics does not count
    assert same_bits(dict(fed.metric_state), dict(by_hand.metric_state))
    assert float(torch.as_tensor(fed.compute()).sum()) == float(torch.as_tensor(by_hand.compute()).sum())


def test_a_result_that_was_computed_by_hand_is_forgotten_with_the_next_batch() -> None:
    metric, seen = Adding(), []
    engine = Engine(take, coordinator=Alone())
    Metrics({"it": metric}).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(float(metric.compute())))
    engine.run([torch.ones(1), torch.ones(2)])
    assert seen == [1.0, 3.0]


def test_a_batch_given_by_hand_enters_that_metric_alone() -> None:
    one, other = MulticlassConfusionMatrix(4), MulticlassConfusionMatrix(4)
    engine = Engine(take, coordinator=Alone())
    Metrics({"one": one, "other": other}).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: one.update(*scores[0]))
    engine.run(scores)
    assert [int(engine.state.metrics[name].sum()) for name in ("one", "other")] == [14, 9]
    assert (one.update_count, other.update_count) == (4, 3)


class Unequal(Exception):
    pass


def fail(error: Exception) -> Callable[[Adding], None]:
    def act(metric: Adding) -> None:
        if metric.total > 1:
            raise error

    return act


DEVICES = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"


@pytest.mark.parametrize(
    "make_error", [lambda: RuntimeError(DEVICES), lambda: RuntimeError("too wide"), lambda: Unequal("no")]
)
def test_an_update_that_raises_leaves_and_says_what_it_does_by_hand(make_error: Callable[[], Exception]) -> None:
    errors = make_error(), make_error()
    fed, by_hand, before, after = Adding(fail(errors[0])), Adding(fail(errors[1])), Adding(), Adding()
    engine = Engine(take, coordinator=Alone())
    Metrics({"before": before, "it": fed, "after": after}).attach(engine)
    data = [torch.ones(1), torch.ones(2)]
    with pytest.raises(type(errors[0])) as raised:
        engine.run(data)
    by_hand.update(data[0])
    with pytest.raises(type(errors[1])) as expected:
        by_hand.update(data[1])
    assert str(raised.value) == str(expected.value)
    assert (raised.value is errors[0]) == (expected.value is errors[1])
    assert (raised.value.__cause__ is errors[0]) == (expected.value.__cause__ is errors[1])
    assert raised.value.__notes__ == ["(metric 'it', Adding, was given (float32 (2,)))"]
    assert same_bits(left(fed), left(by_hand))
    assert [metric.update_count for metric in (before, fed, after)] == [2, 2, 1]
    assert [float(metric.total) for metric in (before, fed, after)] == [3.0, 3.0, 1.0]
    assert torch.is_grad_enabled()


class Passing(WrapperMetric):
    """A wrapper with a way of its own to feed what it wraps; torchmetrics puts nothing around its update."""

    def __init__(self, inner: Adding) -> None:
        super().__init__()
        self.inner = inner

    def update(self, value: torch.Tensor) -> None:
        self.inner.act(self.inner)
        self.inner.update(value)

    def compute(self) -> torch.Tensor:
        return self.inner.compute()


@pytest.mark.parametrize("around", [True, False])
def test_gradients_are_off_in_an_update_and_elsewhere_as_they_were(around: bool) -> None:
    seen: list[bool] = []
    note = lambda metric: seen.append(torch.is_grad_enabled())  # noqa: E731
    asking = Adding(note)
    asking._enable_grad = True
    engine = Engine(take, coordinator=Alone())
    Metrics({"one": Adding(note), "wrapper": Passing(Adding(note)), "asking": asking}).attach(
        engine, lambda output: note(None) or output
    )
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: note(None))
    with torch.set_grad_enabled(around):
        engine.run([torch.ones(1)])
    transform, one, wrapper, wrapped, third, handler = seen
    assert (one, wrapped, third) == (False, False, True)
    assert transform == wrapper == handler == around


def test_what_a_user_puts_around_an_update_is_called() -> None:
    metric, seen = Adding(), []
    engine = Engine(take, coordinator=Alone())
    Metrics({"it": metric}).attach(engine)
    own = metric.update

    @functools.wraps(own)
    def update(value: torch.Tensor) -> None:
        seen.append(value)
        own(value)

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: setattr(metric, "update", update))
    engine.run([torch.ones(1), torch.ones(2)])
    assert len(seen) == 1
    assert int(metric.total) == 3
    assert metric.update_count == 2


class Twice(Adding):
    """Puts something of its own around its update."""

    def _wrap_update(self, update: Callable[..., Any]) -> Callable[..., Any]:
        made = super()._wrap_update(update)

        @functools.wraps(made)
        def twice(value: torch.Tensor) -> None:
            made(value)
            made(value)

        return twice


def test_a_metric_that_wraps_its_update_in_a_way_of_its_own_is_updated_so() -> None:
    twice = Twice()
    fed_by_engine(twice, [torch.ones(1)])
    assert int(twice.total) == 2


def test_lists_go_to_the_host_where_a_metric_asks_for_it() -> None:
    class Moving(BinaryAUROC):
        moved = 0

        def _move_list_states_to_cpu(self) -> None:
            self.moved += 1
            super()._move_list_states_to_cpu()

    asking, other = Moving(compute_on_cpu=True), Moving()
    for metric in (asking, other):
        fed_by_engine(metric, pairs)
    assert (asking.moved, other.moved) == (2, 0)


def test_clones_and_moved_metrics_take_batches_themselves() -> None:
    metric = MulticlassAccuracy(4)
    engine = Engine(take, coordinator=Alone())
    metrics = Metrics({"it": metric}).attach(engine)
    engine.run(scores[:1])
    clone = metric.clone()
    metrics.reset()
    metric.to("cpu").set_dtype(torch.float64)
    engine.run(scores[1:])
    assert metric.update_count == 2
    assert clone.update_count == 1
    assert int(clone.tp.sum() + clone.fn.sum()) == 5


def test_samples_are_counted_once_a_batch_and_only_for_what_is_weighed() -> None:
    counted: list[Any] = []

    def count(batch: Any) -> int:
        counted.append(batch)
        return len(batch)

    def run(**metrics: Metric) -> None:
        engine = Engine(take, coordinator=Alone(), samples_in=count)
        Metrics(metrics).attach(engine, dict.fromkeys(metrics, lambda output: output.mean()) | {"a": lambda o: o.sum()})
        engine.run([torch.ones(2), torch.ones(3)])

    run(a=Adding())
    assert not counted
    run(a=Mean(), b=Mean(), c=Mean())
    assert [len(batch) for batch in counted] == [2, 3]


def calls_in(run: Callable[[], object]) -> int:
    """Functions that Python calls, its own and those in C: what an update costs beside the work on tensors."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


CALLS_OF_AN_EVENT = 40  # to fire it, and to make arguments of the step's output, whatever the number of metrics


@pytest.mark.parametrize("number", [1, 10, 50])
@pytest.mark.parametrize("collection", [False, True], ids=["apart", "collection"])
def test_an_event_calls_no_more_for_each_metric_than_its_update_does(number: int, collection: bool) -> None:
    def made() -> dict[str, Metric]:
        kinds = (MulticlassAccuracy, MulticlassConfusionMatrix)
        return {f"m{at}": kinds[at % 2](4, validate_args=False) for at in range(number)}

    loop = made()
    engine = Engine(take, coordinator=Alone())
    Metrics({"c": MetricCollection(made(), compute_groups=False)} if collection else made()).attach(engine)
    engine.run(scores)  # what is made once is made
    engine.state.output = batch = scores[0]

    def by_event() -> None:
        engine.fire_event(Events.ITERATION_COMPLETED)

    def by_hand() -> None:
        for metric in loop.values():
            metric.update(*batch)

    by_engine, in_loop = ([calls_in(run) for _ in range(3)] for run in (by_event, by_hand))
    assert min(by_engine) <= min(in_loop) + CALLS_OF_AN_EVENT
