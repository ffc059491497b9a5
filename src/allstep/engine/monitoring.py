"""Telling the world's pulse where a run is, for whoever watches over the ranks.

Contract: a run has a `RunMonitor` where its world has a client of the control channel, and none otherwise, so that a
run which nobody watches is the bare loop. `iterate`, `step` and `fire` stand in for `iter`, the step and the firing of
events: each says which section begins, then does the same. The run of an engine inside another's is an "evaluation" to
its outer run, whose place (epoch and iteration) stays the rank's. Cost: half a microsecond an iteration.

Faults of the environment's plan, in an engine's run.

Contract: `Engine` drives its loop inside `FaultInjection`, and the loop calls the step that `with_faults` gives it.
Without a plan neither does anything. With one, the outermost engine of a thread asks `faults.strike` before each batch,
in each step and after it; engines that run inside another's handlers ask nothing, so that an iteration in a plan is the
trainer's. A rank told to leave early returns from its run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

from allstep import faults
from allstep.engine.events import Events
from allstep.engine.state import State
from allstep.faults.fault import When
from allstep.faults.inject import LeftEarly
from allstep.protocol.heartbeat import RankActivity
from allstep.world import World, internals
from allstep.world.failures import Reporter

if TYPE_CHECKING:
    from allstep.engine.engine import Engine


Step = Callable[[Any, Any], Any]


class RunMonitor:
    """The sections and exceptions of one run."""

    def __init__(self, reporter: Reporter, pulse: RankActivity, state: State) -> None:
        self._reporter = reporter
        self._pulse = pulse
        self._state = state

    def saw(self, error: BaseException) -> None:
        """An exception ends the run, unless a handler ends it well."""
        self._reporter.seen(error)

    def ended_well(self) -> None:
        """A handler ended the run well all the same."""
        self._reporter.withdraw()

    def iterate(self, data: Any) -> Iterator[Any]:
        """`iter(data)`, whose every reading is the section "data"."""
        enter, section = self._pulse.enter, "evaluation" if self._pulse.nested else "data"
        enter(section)
        return _Watched(iter(data), enter, section)

    def step(self, step: Step) -> Step:
        """The step, as the section of that name."""
        state, begins, enter, reporter = self._state, self._pulse.step_begins, self._pulse.enter, self._reporter

        def outermost(engine: Any, batch: Any) -> Any:
            if reporter.has_seen:  # an exception of an inner engine, which a handler or the step caught
                reporter.withdraw()
            begins(state.epoch, state.iteration)
            return step(engine, batch)

        def inside_another(engine: Any, batch: Any) -> Any:
            enter("evaluation")
            return step(engine, batch)

        return inside_another if self._pulse.nested else outermost

    def fire(self, fire: Callable[..., None]) -> Callable[..., None]:
        """The firing of events that somebody listens to, as the section "handler"."""
        pulse = self._pulse

        def firing(event: Any, *arguments: Any) -> None:
            pulse.enter("evaluation" if pulse.nested else "handler")
            fire(event, *arguments)

        return firing


@contextmanager
def monitored(name: str, state: State) -> Iterator[RunMonitor | None]:
    """The run of an engine called `name`: what it raises is reported, if there is anybody to report to."""
    world = World.current()
    inner = None if world is None else internals(world)
    if inner is None or inner.reporter is None:
        yield None
        return
    reporter = inner.reporter
    reporter.withdraw()
    with inner.activity.run(name):
        try:
            yield RunMonitor(reporter, inner.activity, state)
        except BaseException as error:
            reporter.seen(error)
            raise


class _Watched:
    __slots__ = ("_enter", "_iterator", "_section")

    def __init__(self, iterator: Iterator[Any], enter: Callable[[str], None], section: str) -> None:
        self._iterator = iterator
        self._enter = enter
        self._section = section

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._enter(self._section)
        return next(self._iterator)


_within: ContextVar[bool] = ContextVar("allstep_rehearses", default=False)


class FaultInjection:
    """Has the plan's faults strike in one drive of an engine's loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._handles: list[Any] = []
        self._token: Token[bool] | None = None

    def __enter__(self) -> None:
        if not faults.active() or _within.get():
            return
        self._token = _within.set(True)
        for event, when in ((Events.GET_BATCH_STARTED, "data"), (Events.ITERATION_COMPLETED, "handler")):
            self._handles.append(self._engine.add_event_handler(event, _strike, when))

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


def with_faults(step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The step of a loop in the making; where there is a plan, faults strike in it before its own work."""
    if not faults.active() or _within.get():
        return step
    return lambda engine, batch: step(engine, _strike(engine, "step", batch))


def _strike(engine: Engine, when: When, batch: Any = None) -> Any:
    state, world = engine.state, World.current()
    rank = engine.coordinator.rank if world is None else world.rank
    attempt = 0 if world is None else world.placement.attempt
    iteration = state.iteration + (when == "data")
    if when == "data" and world is not None:
        internals(world).activity.enter("data")
    return faults.strike(faults.RankPosition(when, rank, attempt, state.epoch, iteration), batch)
