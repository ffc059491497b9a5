"""What a run did, as a list to compare: one entry an event, one a step, one a collective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from allstep.engine import Engine, Events
from allstep.testing import SimulatedRank


def record(engine: Engine, *events: Events) -> list[tuple[str, int, int]]:
    """A list that grows by (name, epoch, iteration) with each of the events, all of them by default."""
    seen: list[tuple[str, int, int]] = []

    def note(name: str) -> None:
        seen.append((name, engine.state.epoch, engine.state.iteration))

    for event in events or tuple(Events):
        engine.add_event_handler(event, lambda *_, name=event.name: note(name))
    return seen


def batches_of(engine: Engine) -> list[Any]:
    """A list that grows by the batch of each completed iteration."""
    seen: list[Any] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.batch))
    return seen


class NoLength:
    """Data that can be iterated again and does not tell its length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


def nothing(engine: Engine, batch: Any) -> None:
    """A step that does nothing."""


def same(engine: Engine, batch: Any) -> Any:
    """A step that returns its batch."""
    return batch


class Told:
    """Data of which each pass says which epoch it was told."""

    def __init__(self, length: int = 3) -> None:
        self.length = length
        self.epoch: int | None = None
        self.calls: list[str] = []

    def set_epoch(self, epoch: int) -> None:
        self.calls.append(f"set {epoch}")
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        self.calls.append("iter")
        return iter([(self.epoch, n) for n in range(self.length)])


class CountingRank:
    """A rank that notes, in `calls`, each vote and each other collective that is asked of it."""

    def __init__(self, inner: SimulatedRank) -> None:
        self._inner = inner
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in ("vote", "gather", "gather_bytes", "broadcast", "reduce_tensor"):
            self.calls.append(name)
        return getattr(self._inner, name)
