"""Worlds of simulated ranks with uneven data and stop requests, and a small model of what has to come out.

The model knows nothing of votes and windows: it says which batch each rank takes in which iteration, given where epochs
were seen to be cut. A batch is a tensor whose rows all hold the batch's name, a number made of rank, epoch and place.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from allstep.coordination import POLICIES, Coordinator, Uneven
from allstep.engine import Engine, Events
from allstep.testing import simulate

Kind = Literal["plain", "list", "stream", "generator"]
Act = Literal["terminate", "terminate_epoch", "interrupt", "set_data"]
REPLACEMENT = 900_000
ROWS = 3  # in a batch at the most


@dataclass(frozen=True)
class Shelf:
    """One rank's data. `counts[e]` batches in a pass that begins in epoch e (from 0); the last count for all after."""

    kind: Kind
    rank: int
    counts: tuple[int, ...]
    last_rows: int = ROWS

    def count(self, epoch: int) -> int:
        return self.counts[min(epoch, len(self.counts) - 1)] if self.kind == "stream" else self.counts[0]

    def names(self, epoch: int) -> list[int]:
        series = min(epoch, len(self.counts) - 1) if self.kind == "stream" else 0
        return [self.rank * 100_000 + series * 1000 + at for at in range(self.count(epoch))]

    def rows(self, name: int) -> int:
        place = name % 1000
        if self.kind == "plain":
            return self.last_rows if place == self.counts[0] - 1 else ROWS
        return place % ROWS + 1

    def build(self) -> Any:
        if self.kind == "plain":
            rows = [name for name in self.names(0) for _ in range(self.rows(name))]
            return DataLoader(Rows(rows), batch_size=ROWS)
        if self.kind == "list":
            return [self.batch(name) for name in self.names(0)]
        return Stream(self) if self.kind == "stream" else (self.batch(name) for name in self.names(0))

    def batch(self, name: int) -> torch.Tensor:
        return torch.full((self.rows(name),), float(name))


class Rows(Dataset[float]):
    def __init__(self, values: list[int]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, at: int) -> float:
        return float(self.values[at])


class Stream:
    """Batches of a length that nobody knows and that changes with the epoch."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([self.shelf.batch(name) for name in self.shelf.names(self.epoch)])


@dataclass(frozen=True)
class Ask:
    """A request that one rank makes when an event is fired for the `count`-th time."""

    act: Act
    rank: int
    event: Events
    count: int


@dataclass(frozen=True)
class Drawn:
    """A world to run."""

    shelves: tuple[Shelf, ...]
    policy: Uneven
    window: int | None
    lookahead: int | None
    accumulate: int
    epoch_length: int | None
    max_epochs: int | None
    max_iters: int | None
    asks: tuple[Ask, ...] = ()


@st.composite
def drawn_worlds(draw: st.DrawFn, *, acts: tuple[Act, ...] = (), policies: tuple[Uneven, ...] = POLICIES) -> Drawn:
    accumulate = draw(st.integers(1, 4))
    size = draw(st.integers(2 if acts and accumulate == 1 else 1, 4))
    policy = draw(st.sampled_from(policies))
    lookahead = draw(st.none() | st.integers(accumulate, 12))
    some = st.integers(0 if draw(st.integers(0, 4)) == 0 else 1, 40)
    shelves = tuple(
        Shelf(
            draw(st.sampled_from(["plain", "list", "stream", "generator"])),
            rank,
            tuple(draw(st.lists(some, min_size=3, max_size=3))),
            draw(st.integers(1, ROWS)),
        )
        for rank in range(size)
    )
    if policy == "error" and draw(st.booleans()):
        shelves = tuple(Shelf(s.kind, s.rank, shelves[0].counts, s.last_rows) for s in shelves)
    by_epochs = draw(st.booleans())
    asks = st.builds(
        Ask,
        st.sampled_from(acts or ("terminate",)),
        st.integers(0, size - 1),
        st.sampled_from(
            [
                Events.ITERATION_COMPLETED,
                Events.ITERATION_COMPLETED,
                Events.ITERATION_STARTED,
                Events.GET_BATCH_STARTED,
                Events.EPOCH_STARTED,
                Events.EPOCH_COMPLETED,
                Events.STARTED,
            ]
        ),
        st.integers(1, 60),
    )
    return Drawn(
        shelves,
        policy,
        draw(st.sampled_from([None, 1, 3])),
        lookahead,
        accumulate,
        draw(st.none() | st.integers(1, 50)),
        draw(st.integers(1, 3)) if by_epochs else None,
        None if by_epochs else draw(st.integers(1, 80)),
        tuple(_soon(ask) for ask in draw(st.lists(asks, max_size=3))) if acts else (),
    )


def _soon(ask: Ask) -> Ask:
    if ask.event is Events.STARTED:
        return Ask(ask.act, ask.rank, ask.event, 1)
    if ask.event in (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED):
        return Ask(ask.act, ask.rank, ask.event, ask.count % 3 + 1)
    return ask


@dataclass
class Step:
    """One iteration as a rank saw it."""

    epoch: int
    iteration: int
    name: int | None
    rows: int
    weight: float
    group_end: bool
    window_ends_at: int


@dataclass
class Log:
    """What one rank saw."""

    events: list[tuple[str, int, int, int | None, str | None]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    unread: dict[int, Any] = field(default_factory=dict)
    asked: list[tuple[Act, int, int, Events]] = field(default_factory=list)
    error: tuple[str, str] | None = None
    stop_reason: str | None = None
    epoch_length: int | None = None
    calls: int = 0


def run_world(drawn: Drawn) -> list[Log]:
    logger = logging.getLogger("allstep.engine")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return simulate(run_rank, len(drawn.shelves), drawn, timeout=15.0)
    finally:
        logger.setLevel(before)


def run_rank(coordinator: Coordinator, drawn: Drawn) -> Log:
    """Run the drawn world's engine on one rank and note what it saw."""
    log = Log()
    rank = coordinator.rank

    def step(engine: Engine, batch: torch.Tensor) -> None:
        state = engine.state
        name = int(batch[0]) if state.active else None
        window_ends_at = engine.extension.window_ends_at
        rows = len(batch) if state.active else 0
        assert state.samples in (None, rows)
        log.steps.append(Step(state.epoch, state.iteration, name, rows, state.weight, state.group_end, window_ends_at))

    engine = Engine(step, coordinator=coordinator, accumulate=drawn.accumulate)
    replacements = 0

    def note(event: Events) -> None:
        state = engine.state
        log.events.append((event.name, state.epoch, state.iteration, state.epoch_length, state.stop_reason))
        if event is Events.EPOCH_COMPLETED:
            log.unread[state.epoch] = state.unread

    for event in Events:
        engine.add_event_handler(event, lambda *_, event=event: note(event))

    def act(ask: Ask) -> None:
        nonlocal replacements
        log.asked.append((ask.act, engine.state.epoch, engine.state.iteration, ask.event))
        if ask.act == "set_data":
            replacements += 1
            start = REPLACEMENT + replacements * 1000
            engine.set_data([torch.full((2,), float(start + at)) for at in range(15)])
        else:
            getattr(engine, ask.act)()

    for ask in drawn.asks:
        if ask.rank == rank:
            filtered = ask.event if ask.event is Events.STARTED else ask.event(once=ask.count)
            engine.add_event_handler(filtered, lambda *_, ask=ask: act(ask))

    terms = {"max_epochs": drawn.max_epochs, "max_iters": drawn.max_iters, "epoch_length": drawn.epoch_length}
    policy = {"uneven": drawn.policy, "window": drawn.window, "lookahead": drawn.lookahead}
    try:
        engine.run(drawn.shelves[rank].build(), **terms, **policy)
        for _ in range(10):
            if log.events[-1][0] != "INTERRUPT":
                break
            engine.run()
    except Exception as error:
        log.error = (type(error).__name__, str(error))
    log.stop_reason, log.epoch_length = engine.state.stop_reason, engine.state.epoch_length
    log.calls = getattr(coordinator, "calls", 0)
    return log


class _Pass:
    """A rank's place in its data, for the model."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.names: deque[int] = deque(shelf.names(0)) if shelf.kind == "generator" else deque()

    def open(self, epoch: int) -> None:
        if self.shelf.kind != "generator":
            self.names = deque(self.shelf.names(epoch - 1))


@dataclass
class Outcome:
    """What the model says: (epoch, iteration, each rank's batch) for each iteration, and what was left unread."""

    steps: list[tuple[int, int, list[int | None]]] = field(default_factory=list)
    unread: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    epoch_length: int | None = None
    is_empty: bool = False
    uneven_at: int | None = None


def expect(drawn: Drawn, cut: set[tuple[int, int]], ended: tuple[int, int, bool] | None) -> Outcome:
    """What the run does when epochs were cut at these (epoch, iteration) and it was terminated at `ended`.

    `ended` is (epoch, iteration, whether that epoch was complete).
    """
    ranks = [_Pass(shelf) for shelf in drawn.shelves]
    counted = drawn.epoch_length or _known_length(drawn)  # else an epoch is what the data gives
    out = Outcome(epoch_length=counted)
    if _known_length(drawn) == 0:
        out.is_empty = True
        return out
    enough = any if drawn.policy == "longest" else all
    one_shot = any(shelf.kind == "generator" for shelf in drawn.shelves)
    iteration = epoch = in_pass = 0
    is_open = said = False
    lost = [(0, 0)] * len(ranks)

    def has_next() -> bool:
        left = [bool(each.names) for each in ranks]
        if not enough(left) and any(left) and out.uneven_at is None:
            out.uneven_at = iteration
        return enough(left)

    def left_now() -> list[tuple[int, int]]:
        return [(len(each.names), sum(map(each.shelf.rows, each.names))) for each in ranks]

    def open_all(of_epoch: int) -> None:
        nonlocal in_pass, is_open, said, lost
        if is_open and not said and drawn.policy != "longest":
            lost = [
                was if each.shelf.kind == "generator" else (was[0] + now[0], was[1] + now[1])
                for each, was, now in zip(ranks, lost, left_now(), strict=True)
            ]
        for each in ranks:
            each.open(of_epoch)
        in_pass, is_open, said = 0, True, False

    while (drawn.max_iters is None or iteration < drawn.max_iters) and epoch != drawn.max_epochs:
        if ended == (epoch, iteration, True) or (ended == (0, 0, False) and not epoch):
            return out
        if iteration and one_shot:
            if not is_open:
                open_all(epoch + 1)
            if not has_next():
                open_all(epoch + 1)
                if not has_next():
                    return out
        epoch, done, is_dry = epoch + 1, 0, False
        if not is_open:
            open_all(epoch)
        while (epoch, iteration) not in cut and (counted is None or done < counted):
            if ended == (epoch, iteration, False) or iteration == drawn.max_iters:
                return out
            if not has_next():
                if iteration == 0:
                    out.is_empty = True
                    return out
                if counted is None and done:
                    out.epoch_length = done
                    break
                if in_pass == 0:
                    is_dry = True
                    break
                open_all(epoch)
                continue
            iteration, done, in_pass = iteration + 1, done + 1, in_pass + 1
            out.steps.append((epoch, iteration, [each.names.popleft() if each.names else None for each in ranks]))
        if is_dry:
            return out
        if (epoch, iteration) in cut:
            is_open = False
        elif drawn.policy != "longest":
            now = left_now()
            said = any(batches == 0 for batches, _ in now)
            out.unread[epoch] = [
                (was[0] + left[0] * said, was[1] + left[1] * said) for was, left in zip(lost, now, strict=True)
            ]
        lost = [(0, 0)] * len(ranks)
    return out


def _known_length(drawn: Drawn) -> int | None:
    if any(shelf.kind in ("stream", "generator") for shelf in drawn.shelves):
        return None
    lengths = [shelf.counts[0] for shelf in drawn.shelves]
    return max(lengths) if drawn.policy == "longest" else min(lengths)
