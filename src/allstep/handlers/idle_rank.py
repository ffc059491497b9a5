"""Whether an event belongs to an iteration that is not this rank's own."""

from __future__ import annotations

from allstep.engine import Engine, Events

_WITH_A_BATCH = frozenset({Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED})


def is_idle(engine: Engine) -> bool:
    """Whether the engine is in an iteration in which this rank has no batch, so that `state.output` means nothing.

    At the end of an epoch or a run it is not, even where the last iteration was such a one.
    """
    return not engine.state.active and engine.last_event_name in _WITH_A_BATCH
