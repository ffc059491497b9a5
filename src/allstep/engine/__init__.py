"""The loop: `Engine`, its `Events` and its `State`, and ready supervised trainers and evaluators."""

from allstep.engine.engine import Engine
from allstep.engine.events import EventEnum, Events, EventsList, FilteredEvent
from allstep.engine.registry import RemovableEventHandle
from allstep.engine.state import State
from allstep.engine.supervised import create_supervised_evaluator, create_supervised_trainer

__all__ = [
    "Engine",
    "EventEnum",
    "Events",
    "EventsList",
    "FilteredEvent",
    "RemovableEventHandle",
    "State",
    "create_supervised_evaluator",
    "create_supervised_trainer",
]
