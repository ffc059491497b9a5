"""Names of what happens in a run, and filters that say when a handler of it is due.

Contract: an event is a member of an `EventEnum`. Calling it with a filter gives a `FilteredEvent`, and `|` joins events
to an `EventsList`. All of them are values: no operation changes its operands. Which counter of the state an event's
filters look at is known to each engine (`Engine.register_events`), not to the event.

A filter is arithmetic on that counter. `matches(count)` says whether the handler is due at this count.
`next_due(count)` gives the smallest count from `count` on at which it may be, so that the loop can leave a handler
alone until then. A filter whose answer only a user's function knows is a candidate at every count.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Integral
from typing import Any, Protocol, TypeAlias

from allstep.errors import ArgumentError, ArgumentTypeError


class EventEnum(Enum):
    """Base of event enumerations; derive from it for events of your own.

    A member called with a filter gives the same event, due only then; see `Events`. It is equal to a member of another
    library's enumeration of the same name, whose name and value are the same.
    """

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, EventEnum) or not isinstance(other, Enum):
            return NotImplemented
        return type(other).__name__ == type(self).__name__ and (other.name, other.value) == (self.name, self.value)

    __hash__ = Enum.__hash__  # by the name, as Ignite's is, so that equal events have equal hashes

    def __call__(
        self,
        event_filter: Callable[[Any, int], bool] | None = None,
        every: int | None = None,
        once: int | Sequence[int] | None = None,
        before: int | None = None,
        after: int | None = None,
    ) -> EventEnum | FilteredEvent:
        """This event, due only when the filter says so.

        Args:
            event_filter: a function `(engine, count) -> bool`.
            every: due at each `every`-th count; with `after`, counted from there.
            once: due at this count, or at each of these.
            before: due only at counts smaller than this.
            after: due only at counts larger than this.

        Raises:
            ArgumentError: a number is out of range, or filters were combined other than `every` with `before`/`after`.
            ArgumentTypeError: `event_filter` is not callable.
        """
        chosen = make_filter(event_filter, every, once, before, after)
        return self if chosen is None else FilteredEvent(self, chosen)

    def __or__(self, other: AnyEvent) -> EventsList:
        return EventsList((self,)) | other


class Events(EventEnum):
    """What every engine fires. Counters for filters: `iteration`, `optimizer_steps` or `epoch`, as noted.

    The loop's order::

        STARTED                                   (epoch)
        for each epoch:
            EPOCH_STARTED                         (epoch)
            for each iteration:
                GET_BATCH_STARTED                 (iterations completed before)
                DATALOADER_STOP_ITERATION         when the data ended and is begun again
                GET_BATCH_COMPLETED               (iterations completed before)
                ITERATION_STARTED                 (iteration)
                the step
                OPTIMIZER_STEP_COMPLETED          (optimizer_steps) when the iteration ends an accumulation group
                ITERATION_COMPLETED               (iteration)
            TERMINATE_SINGLE_EPOCH                after terminate_epoch(); handlers may take `iter_counter`
            EPOCH_COMPLETED                       (epoch)
        TERMINATE                                 after terminate() or max_iters
        COMPLETED                                 (epoch)

    INTERRUPT is fired when `interrupt()` suspends the run, EXCEPTION_RAISED, with the exception, when one ends it.
    """

    STARTED = "started"
    EPOCH_STARTED = "epoch_started"
    GET_BATCH_STARTED = "get_batch_started"
    GET_BATCH_COMPLETED = "get_batch_completed"
    DATALOADER_STOP_ITERATION = "dataloader_stop_iteration"
    ITERATION_STARTED = "iteration_started"
    OPTIMIZER_STEP_COMPLETED = "optimizer_step_completed"
    ITERATION_COMPLETED = "iteration_completed"
    EPOCH_COMPLETED = "epoch_completed"
    TERMINATE_SINGLE_EPOCH = "terminate_single_epoch"
    TERMINATE = "terminate"
    INTERRUPT = "interrupt"
    EXCEPTION_RAISED = "exception_raised"
    COMPLETED = "completed"


COUNTERS: dict[EventEnum, str] = {
    Events.STARTED: "epoch",
    Events.EPOCH_STARTED: "epoch",
    Events.GET_BATCH_STARTED: "iteration",
    Events.GET_BATCH_COMPLETED: "iteration",
    Events.ITERATION_STARTED: "iteration",
    Events.OPTIMIZER_STEP_COMPLETED: "optimizer_steps",
    Events.ITERATION_COMPLETED: "iteration",
    Events.EPOCH_COMPLETED: "epoch",
    Events.COMPLETED: "epoch",
}


@dataclass(frozen=True, slots=True)
class FilteredEvent:
    """An event together with when its handler is due. Made by calling the event."""

    event: EventEnum
    filter: Filter

    @property
    def name(self) -> str:
        """The event's name."""
        return self.event.name

    @property
    def value(self) -> str:
        """The event's value."""
        return str(self.event.value)

    def __or__(self, other: AnyEvent) -> EventsList:
        return EventsList((self,)) | other


@dataclass(frozen=True, slots=True)
class EventsList:
    """Several events, to which one handler is added at once. Made with `|`."""

    events: tuple[EventEnum | FilteredEvent, ...] = ()

    def __or__(self, other: AnyEvent) -> EventsList:
        if isinstance(other, EventsList):
            return EventsList(self.events + other.events)
        if isinstance(other, EventEnum | FilteredEvent):
            return EventsList((*self.events, other))
        raise ArgumentTypeError(
            f"an event can be joined with events only, not with {other!r}; derive your events from EventEnum"
        )

    def __iter__(self) -> Iterator[EventEnum | FilteredEvent]:
        return iter(self.events)

    def __getitem__(self, index: int) -> EventEnum | FilteredEvent:
        return self.events[index]

    def __len__(self) -> int:
        return len(self.events)


AnyEvent: TypeAlias = EventEnum | FilteredEvent | EventsList


def make_filter(
    event_filter: Callable[[Any, int], bool] | None,
    every: int | None,
    once: int | Sequence[int] | None,
    before: int | None,
    after: int | None,
) -> Filter | None:
    """The filter that these arguments describe; None when it lets everything through (`every=1`)."""
    bounded = before is not None or after is not None
    if (event_filter is not None) + (once is not None) + (every is not None or bounded) != 1:
        raise ArgumentError(
            "give one of event_filter, every, once, or before/after; only every can be combined, with before and after"
        )
    if event_filter is not None:
        if not callable(event_filter):
            raise ArgumentTypeError(f"event_filter is {event_filter!r}; it must be a function (engine, count) -> bool")
        _check_takes_engine_and_count(event_filter)
        return FunctionFilter(event_filter)
    if once is not None:
        counts = tuple(once) if isinstance(once, Sequence) else (once,)
        if not counts or not all(is_count(count, 1) for count in counts):
            raise ArgumentError(f"once is {once!r}; it must be an int of at least 1, or some of these")
        return OnceFilter(tuple(sorted(set(counts))))
    for name, value, least in (("every", every, 1), ("before", before, 0), ("after", after, 0)):
        check_count(name, value, least, optional=True)
    if every == 1 and not bounded:
        return None
    limit = NEVER if before is None else before
    return EveryFilter(every or 1, after=(after or 0) if bounded else None, before=limit)


def _check_takes_engine_and_count(function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins tell no signature
        return
    try:
        signature.bind(object(), 1)
    except TypeError:
        raise ArgumentError(
            f"event_filter is called with (engine, count), but {function!r} takes {signature}"
        ) from None


NEVER = math.inf


def is_count(value: object, least: int) -> bool:
    """Whether `value` is an integer, of Python or numpy, of at least `least`."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


def check_count(name: str, value: object, least: int, of: str = "", *, optional: bool = False) -> None:
    """Raise ArgumentError unless the argument of this name is an integer of at least `least`.

    Args:
        name: of the argument.
        value: what was given.
        least: the smallest number that can be meant.
        of: what is counted, such as "samples".
        optional: None is right too.
    """
    if not is_count(value, least) and not (optional and value is None):
        what = f"a number of {of}, an int" if of else "an int"
        raise ArgumentError(f"{name} is {value!r}; it must be {what} of at least {least}")


def check_function(name: str, value: object, of: str, *, optional: bool = False) -> None:
    """Raise ArgumentTypeError unless the argument of this name can be called with what `of` says, such as "a batch"."""
    if not callable(value) and not (optional and value is None):
        other = ", or None" if optional else ""
        raise ArgumentTypeError(f"{name} is {value!r}; it must be a function of {of}{other}")


class Filter(Protocol):
    """When a handler is due."""

    def matches(self, engine: Any, count: int) -> bool:
        """Whether the handler is due at this count of its event."""

    def next_due(self, count: int) -> float:
        """The smallest count, from `count` on, at which the handler may be due; infinity when there is none."""


@dataclass(frozen=True, slots=True)
class EveryFilter:
    """Due each `step` counts: at `step`, 2 `step` …, or, given bounds, at `after` + 1, `after` + 1 + `step` …"""

    step: int
    after: int | None = None
    before: float = NEVER

    def matches(self, engine: Any, count: int) -> bool:
        """Whether `count` is one of the series and inside the bounds."""
        return self.next_due(count) == count

    def next_due(self, count: int) -> float:
        """The first count of the series from `count` on."""
        first = 0 if self.after is None else self.after + 1
        due = count if count <= first else count + (first - count) % self.step
        due = max(due, first)
        return due if due < self.before else NEVER


@dataclass(frozen=True, slots=True)
class OnceFilter:
    """Due at the given counts, which are sorted."""

    counts: tuple[int, ...]

    def matches(self, engine: Any, count: int) -> bool:
        """Whether `count` is one of them."""
        return count in self.counts

    def next_due(self, count: int) -> float:
        """The first of them from `count` on."""
        at = bisect_left(self.counts, count)
        return self.counts[at] if at < len(self.counts) else NEVER


@dataclass(frozen=True, slots=True)
class FunctionFilter:
    """Due when the user's `function(engine, count)` says so."""

    function: Callable[[Any, int], bool]

    def matches(self, engine: Any, count: int) -> bool:
        """What the function answers."""
        return bool(self.function(engine, count))

    def next_due(self, count: int) -> float:
        """Every count: only the function knows."""
        return count
