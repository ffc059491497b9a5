"""`IgniteState`: the state of a run as Ignite's handlers and allstep's loop read it, in one object.

Contract: `state_from` makes one of any state that a script gives to an engine, with all that was set on it. It has the
names of both; Ignite's way of finding an event's counter works for Ignite's events, for events of the script, and for
those of allstep that Ignite does not have.
"""

from __future__ import annotations

from typing import Any

from ignite.engine import State as OriginalState

from allstep.engine import State
from allstep.ignite.translation import OPTIMIZER_STEP_COMPLETED


class IgniteState(State, OriginalState):
    """A run's state: all attributes of Ignite's and of allstep's.

    Args:
        attributes: further attributes to set.
    """

    def __init__(self, **attributes: Any) -> None:
        State.__init__(self)
        self.times = dict.fromkeys(self.times)  # Ignite's are unknown, and not 0, before the first run
        for name, value in attributes.items():
            setattr(self, name, value)
        for counter in OriginalState.event_to_attr.values():  # those of events of the script, too
            if not hasattr(self, counter):
                setattr(self, counter, 0)

    def get_event_attrib_value(self, event_name: Any) -> int:
        """How often an event was fired, as its filters count."""
        if event_name == OPTIMIZER_STEP_COMPLETED:
            return self.optimizer_steps
        return int(super().get_event_attrib_value(event_name))

    def __repr__(self) -> str:
        return OriginalState.__repr__(self)


def state_from(other: Any) -> IgniteState:
    """A state with what `other` has; `other` itself where it is one already."""
    return other if isinstance(other, IgniteState) else IgniteState(**vars(other))
