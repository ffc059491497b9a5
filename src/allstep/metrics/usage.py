"""When a metric begins, takes a batch and is reduced: three events.

Contract: a `Usage` is a value. `Metrics.attach` adds one handler for each of its events; everything that is computed at
the same event of one engine is reduced together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from allstep.engine import EventEnum, Events, EventsList, FilteredEvent
from allstep.engine.events import EveryFilter, Filter, FunctionFilter, OnceFilter
from allstep.errors import ArgumentError, ArgumentTypeError

Event: TypeAlias = EventEnum | FilteredEvent | EventsList
UsageName = Literal["epoch", "running", "run", "iteration"]


@dataclass(frozen=True, slots=True)
class Usage:
    """When states are set to their beginning, when a batch enters them, and when the result is computed.

    Attributes:
        resets: the event, or events joined with `|`, at which counting begins anew. A run that goes on in the middle of
            an epoch, or of the whole run, keeps what was counted.
        updates: the event after which the engine's output is taken; with a filter, only some of them are.
        computes: the event, or events joined with `|`, at which all ranks reduce and the result is set.
    """

    resets: Event = Events.EPOCH_STARTED
    updates: Event = Events.ITERATION_COMPLETED
    computes: Event = Events.EPOCH_COMPLETED

    def only(self, updates: Event) -> Usage:
        """The same, fed at `updates` only, such as `Events.ITERATION_COMPLETED(every=10)`.

        What is computed after each iteration is then computed after each that is fed, since before the first there is
        nothing to compute. Not so with an `event_filter`: all ranks must compute at the same iterations, and that one
        may depend on the rank; give `computes` a filter too, which does not.
        """
        # With a filter on the feeding alone, the first iterations would compute what has seen nothing.
        follows = (
            self.computes == Events.ITERATION_COMPLETED
            and isinstance(updates, FilteredEvent)
            and updates.event is Events.ITERATION_COMPLETED
            and isinstance(updates.filter, EveryFilter | OnceFilter)
        )
        return replace(self, updates=updates, computes=updates if follows else self.computes)

    def every(self, iterations: int) -> Usage:
        """The same, computed each so many iterations."""
        event = Events.ITERATION_COMPLETED(every=iterations)
        return replace(self, computes=event)


EPOCH = Usage()
RUNNING = Usage(computes=Events.ITERATION_COMPLETED)
RUN = Usage(resets=Events.STARTED, computes=Events.COMPLETED)
ITERATION = Usage(resets=Events.ITERATION_STARTED, computes=Events.ITERATION_COMPLETED)

USAGES: dict[str, Usage] = {"epoch": EPOCH, "running": RUNNING, "run": RUN, "iteration": ITERATION}


def as_usage(usage: Usage | UsageName) -> Usage:
    """The usage that a name stands for.

    Raises:
        ArgumentError: an unknown name, or several events to be fed at.
        ArgumentTypeError: a usage's event is none.
    """
    if isinstance(usage, Usage):
        _check(usage)
        return usage
    if usage not in USAGES:
        raise ArgumentError(f"usage is {usage!r}; it must be a Usage or one of {', '.join(map(repr, USAGES))}")
    return USAGES[usage]


def _check(usage: Usage) -> None:
    for name in ("resets", "updates", "computes"):
        event = getattr(usage, name)
        if not isinstance(event, EventEnum | FilteredEvent | EventsList) or event == EventsList():
            raise ArgumentTypeError(f"{name} is {event!r}; it must be an event, such as Events.EPOCH_COMPLETED")
    if isinstance(usage.updates, EventsList):
        raise ArgumentError(
            f"updates is {event_name(usage.updates)}; it must be one event, since a batch that two of them are due at "
            "would be counted twice. Use one event with an event_filter"
        )


def base_event(event: EventEnum | FilteredEvent) -> EventEnum:
    """The event without its filter."""
    return event.event if isinstance(event, FilteredEvent) else event


def each_event(event: Event) -> tuple[EventEnum | FilteredEvent, ...]:
    """The events of a list, each once; or the one that was given."""
    return tuple(dict.fromkeys(event)) if isinstance(event, EventsList) else (event,)


def event_name(event: Event) -> str:
    """What the event is called where ranks compare what they reduce: the same text for equal filters."""
    if isinstance(event, EventsList):
        return " | ".join(map(event_name, event))
    if isinstance(event, FilteredEvent):
        return f"{event.event.name}({_filter_text(event.filter)})"
    return event.name


def _filter_text(chosen: Filter) -> str:
    # Ranks compare this text: a function is named, since its address differs from process to process.
    if isinstance(chosen, FunctionFilter):
        return f"event_filter={getattr(chosen.function, '__qualname__', type(chosen.function).__qualname__)}"
    if isinstance(chosen, OnceFilter):
        return f"once={', '.join(map(str, chosen.counts))}"
    if isinstance(chosen, EveryFilter):
        bounds = f", after={chosen.after}, before={chosen.before}" if chosen.after is not None else ""
        return f"every={chosen.step}{bounds}"
    return type(chosen).__qualname__
