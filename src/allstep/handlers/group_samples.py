"""Samples of all ranks in an accumulation group, for a handler whose steps are a matter of samples.

Contract: `count_group_samples` is called by `attach`. At OPTIMIZER_STEP_COMPLETED the number is what
`engine.extension.samples_in_group()` gives then, the same on all ranks and without asking them.
"""

from __future__ import annotations

from allstep.engine import Engine, Events
from allstep.engine.events import AnyEvent
from allstep.errors import ArgumentError


def count_group_samples(engine: Engine, event: AnyEvent) -> None:
    """Have samples counted in the coming runs.

    Args:
        engine: that trains.
        event: at which the handler asks for them.

    Raises:
        ArgumentError: it is another event than OPTIMIZER_STEP_COMPLETED.
    """
    if event is not Events.OPTIMIZER_STEP_COMPLETED:
        raise ArgumentError(f"event is {event!r}; samples are counted at OPTIMIZER_STEP_COMPLETED, its default")
    engine.extension.count_samples()
