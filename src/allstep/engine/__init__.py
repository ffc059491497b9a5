"""The loop: `Engine`, its `Events` and its `State`.

What lives here: everything about one run of one engine. `engine` is the face that users call; `run` is the record that
the others are handed; `loop` runs the iterations, `passes` gives it batches, and `agreed_batches` has ranks agree on
them. What does not: how a vote travels (`coordination`), where data comes from (`data`), what is made of outputs
(`metrics`, `outputs`), saving to files (`checkpoint`), decisions to stop (`handlers`), and ready engines (`trainers`).
Those use `extension`.
"""

from allstep.engine.engine import Engine
from allstep.engine.events import EventEnum, Events, EventsList, FilteredEvent
from allstep.engine.extension import Extension
from allstep.engine.registry import RemovableEventHandle
from allstep.engine.state import State

__all__ = [
    "Engine",
    "EventEnum",
    "Events",
    "EventsList",
    "Extension",
    "FilteredEvent",
    "RemovableEventHandle",
    "State",
]
