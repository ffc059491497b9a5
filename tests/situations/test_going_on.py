"""Going on after something: a run that was left is taken up as if it had not been, alive or from its saved state.

Each situation is stopped somewhere and gone on with, in the same engine ("alive") and in a new one that loads its
`state_dict` ("saved"). The value to come to is that of a plain loop that is never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from allstep import Engine, Events, Metrics, World
from allstep.metrics import Mean, Sum
from tests.situations.judge import Judge

SAMPLES, GLOBAL_BATCH, EPOCHS = 24, 6, 3
BATCHES = SAMPLES // GLOBAL_BATCH


class Stopped(Exception):
    """What a situation raises once."""


class Once:
    """Calls `action` at the `count`-th call and never again."""

    def __init__(self, count: int, action: Callable[[], Any]) -> None:
        self.left = count
        self.action = action

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()


def failing() -> None:
    raise Stopped


def samples() -> torch.Tensor:
    return torch.linspace(-1, 2, SAMPLES, dtype=torch.float64)


def plain_weights(*, epochs: int = EPOCHS, accumulate: int = 1, skipped: tuple[int, ...] = ()) -> list[float]:
    """A plain loop over all samples in one process; `skipped` are iterations, from 1, that a cut leaves out."""
    weight = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    batches = samples().split(GLOBAL_BATCH)
    iteration = 0
    for _ in range(epochs):
        for start in range(0, BATCHES, accumulate):
            kept = []
            for batch in batches[start : start + accumulate]:
                iteration += 1
                if iteration not in skipped:
                    kept.append(batch)
            if kept:
                optimizer.zero_grad()
                ((weight * torch.cat(kept) - 1) ** 2).mean().backward()
                optimizer.step()
    return weight.tolist()


class Training:
    """A model under DDP, its optimizer and an engine over a loader of the world, built anew for each process' life."""

    def __init__(self, world: World, accumulate: int = 1) -> None:
        self.loader = world.loader(samples(), global_batch_size=GLOBAL_BATCH)
        self.net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(self.net.weight, 2.0)
        self.model = world.wrap(self.net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.after_backward: Callable[..., None] = lambda: None
        self.engine = Engine(self.step, accumulate=accumulate, name="training")

    def step(self, engine: Engine, batch: torch.Tensor) -> torch.Tensor:
        loss = ((self.model(batch[:, None]) - 1) ** 2).mean()
        (loss * engine.state.weight).backward()
        self.after_backward()
        if engine.state.group_end:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return batch

    def run(self, **more: Any) -> None:
        self.engine.run(self.loader, max_epochs=EPOCHS, **more)

    def weights(self) -> list[float]:
        return self.net.weight.flatten().tolist()


def go_on(world: World, first: Training, way: str) -> Training:
    """Run to the end, in the same engine or in another that loads all that was saved of it."""
    if way == "alive":
        first.run()
        return first
    second = Training(world, first.engine.accumulate)
    second.net.load_state_dict(first.net.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.engine.load_state_dict(first.engine.state_dict())
    second.run()
    return second


WAYS = ("alive", "saved")


def both_ways(world: World, situation: Callable[..., Any], *cases: Sequence[Any]) -> dict[str, Any]:
    """What a situation `(world, way, *case)` comes to, by case and way: one call of the ranks for all of them."""
    return {f"{case} {way}": situation(world, way, *case) for case in cases for way in WAYS}


def expected_of(value: Callable[..., Any], *cases: Sequence[Any]) -> dict[str, Any]:
    return {f"{case} {way}": value(*case) for case in cases for way in WAYS}


def _asked(world: World, way: str, request: str, iteration: int, accumulate: int) -> tuple[Any, ...]:
    first = Training(world, accumulate)
    more = {"agreed": True} if request == "terminate" else {}
    ask = Once(iteration, lambda: getattr(first.engine, request)(**more))
    first.engine.add_event_handler(Events.ITERATION_COMPLETED, ask)
    first.run(window=1)
    stopped = first.engine.state.iteration < EPOCHS * BATCHES
    last = go_on(world, first, way)
    state = last.engine.state
    return stopped, last.weights(), state.iteration, state.epoch, state.optimizer_steps


STOPS = [("terminate", 6, 1), ("terminate", 8, 1), ("terminate", 6, 2), ("interrupt", 5, 1), ("interrupt", 6, 2)]


def test_after_terminate_and_interrupt_the_epochs_rest_is_run(same_at_every_world_size: Judge) -> None:
    """pytorch/ignite#1386, #2669: run() after terminate()."""

    def unbroken(request: str, iteration: int, accumulate: int) -> tuple[Any, ...]:
        steps = EPOCHS * BATCHES // accumulate
        return True, plain_weights(accumulate=accumulate), EPOCHS * BATCHES, EPOCHS, steps

    same_at_every_world_size(both_ways, expected_of(unbroken, *STOPS), _asked, *STOPS)


def _cut(world: World, way: str) -> tuple[Any, ...]:
    first = Training(world)
    first.engine.add_event_handler(Events.EPOCH_COMPLETED, Once(2, lambda: first.engine.terminate(agreed=True)))
    first.engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: first.engine.terminate_epoch())
    first.run(window=1)
    cut_at = first.engine.state.iteration - BATCHES
    last = go_on(world, first, way)
    epochs, iterations = last.engine.state.epoch, last.engine.state.iteration
    expected = plain_weights(skipped=tuple(range(cut_at + 1, BATCHES + 1)))
    return epochs, iterations - cut_at, last.weights() == pytest.approx(expected)


def test_after_terminate_epoch_later_epochs_are_whole(same_at_every_world_size: Judge) -> None:
    whole = (EPOCHS, 2 * BATCHES, True)
    same_at_every_world_size(both_ways, expected_of(lambda: whole, ()), _cut, ())


def _failed(world: World, way: str, place: str, accumulate: int, error: type[BaseException]) -> tuple[Any, ...]:
    def fail() -> None:
        raise error

    first = Training(world, accumulate)
    if place == "backward":
        first.after_backward = Once(6, fail)
    else:
        first.engine.add_event_handler(Events[place], Once(2 if "EPOCH" in place or accumulate == 4 else 6, fail))
    with pytest.raises((Stopped, KeyboardInterrupt)):
        first.run()
    state = (last := go_on(world, first, way)).engine.state
    return last.weights(), state.iteration, state.epoch, state.optimizer_steps


PLACES = [
    *("backward", "GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED", "ITERATION_COMPLETED"),
    *("OPTIMIZER_STEP_COMPLETED", "EPOCH_STARTED", "EPOCH_COMPLETED"),
]
FAILURES = [
    *((place, accumulate, Stopped) for place in PLACES for accumulate in (1, 2)),
    ("backward", 4, Stopped),
    ("backward", 1, KeyboardInterrupt),
    ("backward", 4, KeyboardInterrupt),
]


def test_a_run_that_failed_anywhere_comes_to_what_an_unbroken_one_does(same_at_every_world_size: Judge) -> None:
    """mosaicml/composer#108 (Ctrl-C, then fit() again): gradients and batches of the failed step."""

    def unbroken(place: str, accumulate: int, error: type[BaseException]) -> tuple[Any, ...]:
        return plain_weights(accumulate=accumulate), EPOCHS * BATCHES, EPOCHS, EPOCHS * BATCHES // accumulate

    same_at_every_world_size(both_ways, expected_of(unbroken, *FAILURES), _failed, *FAILURES)


def _metrics(world: World, places: Sequence[tuple[str, int]]) -> list[list[float]]:
    return [_metrics_of(world, place, accumulate) for place, accumulate in places]


def _metrics_of(world: World, place: str, accumulate: int) -> list[float]:
    training, seen = Training(world, accumulate), []
    Metrics({"mean": Mean()}).attach(training.engine, lambda batch: batch)
    if place == "backward":
        training.after_backward = Once(7, failing)
    else:
        training.engine.add_event_handler(Events[place], Once(7, failing))
    Metrics({"sum": Sum()}).attach(training.engine, lambda batch: batch)
    training.engine.add_event_handler(
        Events.EPOCH_COMPLETED, lambda e: seen.extend(float(e.state.metrics[name]) for name in ("mean", "sum"))
    )
    with pytest.raises(Stopped):
        training.run()
    training.run()
    return seen


def test_metrics_take_each_batch_once(same_at_every_world_size: Judge) -> None:
    """A batch that is done again is not counted again; one behind whose step a handler failed is counted."""
    places = [(place, accumulate) for place in ("backward", "ITERATION_COMPLETED") for accumulate in (1, 2, 4)]
    expected = [[float(samples().mean()), float(samples().sum())] * EPOCHS] * len(places)
    same_at_every_world_size(_metrics, expected, places)


def _handlers_behind(world: World, events: Sequence[tuple[str, bool]]) -> list[tuple[Any, ...]]:
    return [_handlers_behind_one(world, event, last_epoch) for event, last_epoch in events]


def _handlers_behind_one(world: World, event: str, last_epoch: bool) -> tuple[Any, ...]:
    training, calls = Training(world), []
    count = EPOCHS if event == "EPOCH_COMPLETED" else EPOCHS * BATCHES
    training.engine.add_event_handler(Events[event], lambda: calls.append("first"))
    training.engine.add_event_handler(Events[event], Once(count if last_epoch else count // 2, failing))
    training.engine.add_event_handler(Events[event], lambda: calls.append("behind"))
    training.engine.add_event_handler(Events.COMPLETED, lambda: calls.append("end"))
    with pytest.raises(Stopped):
        training.run()
    training.run()
    return calls.count("first"), calls.count("behind"), calls.count("end"), training.weights()


def test_handlers_behind_one_that_failed_are_called_once(same_at_every_world_size: Judge) -> None:
    """A scheduler, or a checkpoint, behind an evaluation that failed."""
    events = [
        (event, last)
        for event in ("EPOCH_COMPLETED", "ITERATION_COMPLETED", "OPTIMIZER_STEP_COMPLETED")
        for last in (False, True)
    ]
    times = [EPOCHS if event == "EPOCH_COMPLETED" else EPOCHS * BATCHES for event, _ in events]
    expected = [(each, each, 1, plain_weights()) for each in times]
    same_at_every_world_size(_handlers_behind, expected, events)
