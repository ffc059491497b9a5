"""When metrics begin, take a batch and are computed."""

from __future__ import annotations

from typing import Any

import pytest

from allstep import Alone, Engine, Events
from allstep.coordination import Coordinator
from allstep.errors import NotComputableError
from allstep.metrics import EPOCH, ITERATION, RUNNING, Max, Metrics, Sum, Usage
from allstep.testing import simulate
from tests.metrics.noting import Noting
from tests.metrics.worlds import take


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


def test_what_is_fed_at_some_iterations_is_computed_at_those() -> None:
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


def test_a_usage_may_compute_and_begin_at_several_events() -> None:
    engine = Engine(take, coordinator=Alone())
    both = Usage(resets=Events.STARTED | Events.EPOCH_STARTED, computes=Events.EPOCH_COMPLETED | Events.COMPLETED)
    metrics = Metrics({"n": Noting()}).attach(engine, usage=both)
    seen: list[int] = []
    for event in (Events.EPOCH_COMPLETED, Events.COMPLETED):
        engine.add_event_handler(event, lambda e: seen.append(int(e.state.metrics["n"])))
    engine.run([1, 2], max_epochs=2)
    assert seen == [2, 2, 2]
    assert len(engine.extension.reductions) == 2
    metrics.detach()
    assert engine.extension.reductions == []


def test_a_batch_is_fed_at_one_event_only_and_at_nothing_else_than_an_event() -> None:
    engine, every = Engine(take, coordinator=Alone()), Events.ITERATION_COMPLETED
    with pytest.raises(ValueError, match="counted twice"):
        Metrics({"n": Noting()}).attach(engine, usage=EPOCH.only(every(every=2) | every(every=3)))
    with pytest.raises(TypeError, match="computes is 'epoch'"):
        Metrics({"n": Noting()}).attach(engine, usage=Usage(computes="epoch"))  # type: ignore[arg-type]
    assert engine.extension.reductions == []


def test_an_interrupted_epoch_is_counted_on() -> None:
    engine = Engine(take, coordinator=Alone())
    Metrics({"n": Noting()}).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.interrupt())
    engine.run([1, 2, 3, 4])
    assert "n" not in engine.state.metrics
    engine.run([1, 2, 3, 4])
    assert int(engine.state.metrics["n"]) == 4
