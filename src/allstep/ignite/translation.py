"""allstep's events in Ignite's form, so that an engine keeps all its handlers under events of one kind.

Contract: `to_ignite` gives for any event, filtered or joined, of either library or a string, what Ignite's engine
takes; Ignite's own pass as they are. Events of the same name are one event in Ignite, so the loop's `Events.STARTED`
and Ignite's have the same handlers. Nothing here can fail: what is no event is left for Ignite's engine to refuse.
"""

from __future__ import annotations

from typing import Any

from ignite.engine import CallableEventWithFilter
from ignite.engine import Events as IgniteEvents
from ignite.engine import EventsList as IgniteEventsList

from allstep.engine import EventEnum, Events, EventsList, FilteredEvent


def _plain(event: EventEnum) -> Any:
    own = getattr(IgniteEvents, event.name, None) if isinstance(event, Events) else None
    return CallableEventWithFilter(str(event.value), None, event.name) if own is None else own


_OF_THE_LOOP = {event: _plain(event) for event in Events}

OPTIMIZER_STEP_COMPLETED = _OF_THE_LOOP[Events.OPTIMIZER_STEP_COMPLETED]
"""allstep's event that Ignite has no member for."""


def to_ignite(event: Any) -> Any:
    """An event as Ignite's engine knows it; anything else as it is."""
    if isinstance(event, Events):
        return _OF_THE_LOOP[event]
    if isinstance(event, EventEnum):
        return _plain(event)
    if isinstance(event, FilteredEvent):
        # Ignite calls a filter with the engine and the count, as allstep does.
        return CallableEventWithFilter(event.value, event.filter.matches, event.name)
    if isinstance(event, EventsList):
        joined = IgniteEventsList()
        for each in event:
            joined = joined | to_ignite(each)
        return joined
    return event
