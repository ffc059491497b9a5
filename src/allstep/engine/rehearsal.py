"""Faults of the environment's plan, in an engine's run.

Contract: `Engine` drives its loop inside `Rehearsal`. Without a plan that does nothing. With one, the outermost engine
of a thread asks `faults.strike` before each batch, in each step and after it; engines that run inside another's
handlers ask nothing, so that an iteration in a plan is the trainer's. A rank told to leave early returns from its run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

from allstep import faults
from allstep.engine.events import Events
from allstep.faults.acts import LeftEarly
from allstep.faults.fault import When
from allstep.world import World

if TYPE_CHECKING:
    from allstep.engine.engine import Engine
    from allstep.engine.loop import Loop

_within: ContextVar[bool] = ContextVar("allstep_rehearses", default=False)


class Rehearsal:
    """Has the plan's faults strike in one drive of an engine's loop."""

    def __init__(self, engine: Engine, loop: Loop | None) -> None:
        self._engine = engine
        self._loop = loop
        self._handles: list[Any] = []
        self._token: Token[bool] | None = None

    def __enter__(self) -> None:
        if not faults.active() or _within.get() or self._loop is None:
            return
        self._token = _within.set(True)
        for event, when in ((Events.GET_BATCH_STARTED, "data"), (Events.ITERATION_COMPLETED, "handler")):
            self._handles.append(self._engine.add_event_handler(event, _strike, when))
        self._loop.wrap_step(_with_faults)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self._token is None:
            return False
        _within.reset(self._token)
        for handle in self._handles:
            handle.remove()
        if isinstance(error, LeftEarly):
            self._engine._drop_run()
            return True
        return False


class _StruckStep:
    """A step in which faults strike before its own work."""

    def __init__(self, step: Callable[[Any, Any], Any]) -> None:
        self._step = step

    def __call__(self, engine: Engine, batch: Any) -> Any:
        return self._step(engine, _strike(engine, "step", batch))


def _with_faults(step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return step if isinstance(step, _StruckStep) else _StruckStep(step)


def _strike(engine: Engine, when: When, batch: Any = None) -> Any:
    state, world = engine.state, World.current()
    rank = engine.coordinator.rank if world is None else world.rank
    attempt = 0 if world is None else world.placement.attempt
    iteration = state.iteration + (when == "data")
    return faults.strike(faults.Here(when, rank, attempt, state.epoch, iteration), batch)
