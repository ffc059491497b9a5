"""On a device that collects work a step has an end; a World with a counting stand-in takes the device's place."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

import allstep
from allstep import Engine, Events
from allstep.engine.step_boundary import MOST_TOGETHER
from allstep.world import internals


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What happened, in order, in a World whose device is told where steps end."""
    log: list[str] = []
    with allstep.init(device="cpu") as world:
        internals(world).end_step = lambda: log.append("end")
        yield log


def engine(log: list[str], accumulate: int = 1) -> Engine:
    def step(engine: Engine, batch: int) -> int:
        log.append(f"step {batch}")
        return batch

    return Engine(step, accumulate=accumulate)


def test_a_step_ends_before_its_handlers_and_epochs_apart_from_steps(told):
    trainer = engine(told)
    for event in (Events.EPOCH_STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
        trainer.add_event_handler(event, lambda _, name: told.append(name), event.name.lower())
    trainer.run([1, 2], max_epochs=1)
    assert told == [
        *("epoch_started", "end"),
        *("step 1", "end", "iteration_completed", "step 2", "end", "iteration_completed"),
        *("end", "epoch_completed", "end"),
    ]


@pytest.mark.parametrize(
    ("accumulate", "batches", "ends"),
    [(3, 7, [3, 6, 7]), (MOST_TOGETHER + 2, MOST_TOGETHER + 3, [MOST_TOGETHER, MOST_TOGETHER + 2, MOST_TOGETHER + 3])],
)
def test_an_accumulation_group_is_one_graph_unless_it_is_long(told, accumulate, batches, ends):
    engine(told, accumulate).run(range(1, batches + 1), max_epochs=1)
    inside = told[1:-2]  # without those before and behind the epoch's iterations
    assert [inside[at - 1] for at, each in enumerate(inside) if each == "end"] == [f"step {each}" for each in ends]


def test_elsewhere_the_loop_calls_the_step_itself():
    callers = []

    def step(engine: Engine, batch: int) -> None:
        callers.append(inspect.currentframe().f_back.f_code.co_name)

    Engine(step).run([1, 2])
    assert set(callers) == {"_iterate"}
