"""What a run tells the world's activity, and that it tells nothing where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from allstep.engine import Engine, Events
from allstep.placement import Placement
from allstep.world import World, internals
from allstep.world.lifetime import make_current
from tests.engine.recording import nothing
from tests.world.watching import watched_world

_PLAIN = ["data", "step"]


def test_each_iteration_is_data_and_step_and_handler_where_one_is_called():
    with watched_world() as (_, _, activity):
        engine = Engine(nothing)
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: None)
        activity.entered.clear()
        engine.run([1, 2, 3])
        assert activity.entered == ["data", *_PLAIN, *_PLAIN, "handler", *_PLAIN, "idle"]  # the first is that of iter()
        assert activity.begun == 3


def test_the_pulse_has_the_place_of_the_run_and_its_engines_name():
    places = []

    def step(engine: Engine, batch: Any) -> None:
        places.append((activity.engine, activity.epoch, activity.iteration, activity.section_name))

    with watched_world() as (_, _, activity):
        assert activity.section_name == "startup"
        Engine(step, name="trainer").run([1, 2], max_epochs=2)
        assert places == [("trainer", epoch, at, "step") for epoch, at in ((1, 1), (1, 2), (2, 3), (2, 4))]
        assert (activity.section_name, activity.epoch, activity.iteration) == ("idle", 2, 4)


def test_an_engine_inside_another_is_an_evaluation_at_the_outer_ones_place():
    seen = []

    def evaluate(engine: Engine, batch: Any) -> None:
        seen.append((activity.engine, activity.epoch, activity.iteration, activity.section_name))

    def after(engine: Engine) -> None:
        before = activity.section_name
        evaluator.run(range(2))
        seen.append((before, activity.engine, activity.section_name))

    with watched_world() as (_, _, activity):
        evaluator = Engine(evaluate, name="evaluator")
        trainer = Engine(nothing, name="trainer")
        trainer.add_event_handler(Events.EPOCH_COMPLETED, after)
        trainer.run(range(5))
    inside = ("evaluator", 1, 5, "evaluation")
    assert seen == [inside, inside, ("handler", "trainer", "handler")]
    assert activity.begun == 5


def test_an_inner_engines_exception_gives_the_outer_one_its_place_back():
    def fail(engine: Engine, batch: Any) -> None:
        raise ValueError("inside")

    def guarded(engine: Engine, batch: Any) -> None:
        with pytest.raises(ValueError, match="inside"):
            Engine(fail, name="inner").run([1])
        places.append((activity.engine, activity.section_name))

    places: list[tuple[str, str]] = []
    with watched_world() as (_, client, activity):
        Engine(guarded, name="outer").run([1, 2])
    assert places == [("outer", "step")] * 2
    said = [each if isinstance(each, str) else (each.kind, each.section) for each in client.said]
    assert said == [("ValueError", "evaluation"), "withdraw", ("ValueError", "evaluation"), "bye"]


def test_an_exception_is_reported_where_it_happened_before_any_handler_sees_it():
    order = []

    def step(engine: Engine, batch: Any) -> None:
        if engine.state.iteration == 2:
            raise ValueError("the cause")

    with watched_world() as (_, client, _activity):
        engine = Engine(step)
        engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: order.append(len(client.said)))
        with pytest.raises(ValueError, match="the cause"):
            engine.run([1, 2, 3])
        (failure,) = client.said
    assert order == [1]
    assert (failure.kind, failure.epoch, failure.iteration, failure.section) == ("ValueError", 1, 2, "step")
    assert not failure.leaving
    assert "the cause" in failure.traceback


def test_what_the_data_raises_is_reported_in_the_section_data():
    def batches():
        yield 1
        raise OSError("a broken shard")

    with watched_world() as (_, client, _activity):
        with pytest.raises(OSError, match="a broken shard"):
            Engine(nothing).run(batches(), epoch_length=3)
        assert client.said[0].section == "data"


def test_what_was_seen_is_withdrawn_when_another_run_begins():
    def fail(engine: Engine, batch: Any) -> None:
        raise MemoryError

    with watched_world() as (_, client, _):
        with pytest.raises(MemoryError):
            Engine(fail).run([1])
        Engine(nothing).run([1])
        assert client.said[1:] == ["withdraw"]


def test_a_run_that_a_handler_ends_well_after_an_exception_is_no_failure():
    def fail(engine: Engine, batch: Any) -> None:
        raise ValueError("expected")

    with watched_world() as (_, client, _):
        engine = Engine(fail)
        engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: engine.terminate())
        engine.run([1])
        assert [getattr(each, "kind", each) for each in client.said] == ["ValueError", "withdraw"]


def test_a_suspended_run_is_idle_and_goes_on_where_it_was():
    with watched_world() as (_, _, activity):
        engine = Engine(nothing, name="trainer")
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
        engine.run(range(4))
        assert (activity.section_name, activity.engine) == ("idle", "")
        engine.run()
        assert (activity.iteration, activity.begun) == (4, 4)


def test_without_a_monitor_the_loop_uses_the_bare_step_and_data():
    callers: list[tuple[str, str]] = []

    class Iterating:
        left = 2

        def __next__(self) -> int:
            self.left -= 1
            callers.append(("data", sys._getframe(1).f_code.co_name))
            return self.left

    class Batches:
        def __iter__(self) -> Iterator[int]:
            return Iterating()

    def step(engine: Engine, batch: int) -> None:
        callers.append(("step", sys._getframe(1).f_code.co_name))

    world = World(Placement("alone"), torch.device("cpu"), None, 60.0)
    make_current(world)
    Engine(step).run(Batches(), epoch_length=2)
    world.close()
    assert callers == [("data", "_iterate"), ("step", "_iterate")] * 2


def test_watching_costs_less_than_a_microsecond_an_iteration():
    def run() -> float:
        began = time.process_time()
        Engine(nothing).run(range(50_000))
        return time.process_time() - began

    bare = min(run() for _ in range(5))
    with watched_world() as (world, _, activity):
        inner = internals(world)
        inner.reporter._activity = inner.activity = type(activity).__base__()  # the real one, which notes nothing
        monitored = min(run() for _ in range(5))
    print(f"{(monitored - bare) / 50_000 * 1e6:.2f} µs an iteration")
    assert (monitored - bare) / 50_000 < 1.5e-6  # well under a microsecond; the bound allows for a loaded machine
