"""When a metric begins, takes a batch and is reduced: three events.

Contract: a `Usage` is a value. `Metrics.attach` adds one handler for each of its events; everything that is computed at
the same event of one engine is reduced together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from allstep.engine import EventEnum, Events, FilteredEvent

Event: TypeAlias = EventEnum | FilteredEvent
UsageName = Literal["epoch", "running", "run", "iteration"]


@dataclass(frozen=True, slots=True)
class Usage:
    """When states are set to their beginning, when a batch enters them, and when the result is computed.

    Attributes:
        resets: the event at which counting begins anew. A run that goes on in the middle of an epoch, or of the whole
            run, keeps what was counted.
        updates: the event after which the engine's output is taken; with a filter, only some of them are.
        computes: the event at which all ranks reduce and the result is set.
    """

    resets: Event = Events.EPOCH_STARTED
    updates: Event = Events.ITERATION_COMPLETED
    computes: Event = Events.EPOCH_COMPLETED

    def only(self, updates: Event) -> Usage:
        """The same, fed at `updates` only, such as `Events.ITERATION_COMPLETED(every=10)`."""
        return replace(self, updates=updates)

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
    """The usage that a name stands for. Raises ValueError for an unknown name."""
    if isinstance(usage, Usage):
        return usage
    if usage not in USAGES:
        raise ValueError(f"usage is {usage!r}; it must be a Usage or one of {', '.join(map(repr, USAGES))}")
    return USAGES[usage]


def base_event(event: Event) -> EventEnum:
    """The event without its filter."""
    return event.event if isinstance(event, FilteredEvent) else event


def event_name(event: Event) -> str:
    """What the event is called where ranks compare what they reduce."""
    if isinstance(event, FilteredEvent):
        return f"{event.event.name}({type(event.filter).__name__})"
    return event.name
