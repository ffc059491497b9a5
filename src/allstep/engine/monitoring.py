"""What else happens around a run: the monitor is told where it is, and a plan's faults strike in it.

Contract: a run has a `RunMonitor` where its world reports to a service, and none otherwise, so that a run which nobody
watches is the bare loop. `iterate`, `step` and `fire` stand in for `iter`, the step and the firing of events. Each says
which section begins, then does the same. The run of an engine inside another's is an "evaluation" to its outer run,
whose place (epoch and iteration) stays the rank's. It costs half a microsecond an iteration.

Where there is a plan of faults, `fault_injection` is around the loop and `with_faults` around the step: the outermost
engine of a thread asks `faults.strike` before each batch, in each step and after it. Engines that run inside another's
handlers ask nothing, so that an iteration in a plan is the trainer's. Without a plan neither does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from allstep import faults
from allstep.duration_words import took_in_words
from allstep.engine.events import Events
from allstep.engine.registry import Registry
from allstep.engine.replica_audit import flip_bit
from allstep.engine.run import Run
from allstep.engine.state import State
from allstep.faults.fault import When
from allstep.faults.inject import LeftEarly
from allstep.protocol.heartbeat import RankActivity
from allstep.world import World, WorldInternals, internals
from allstep.world.failures import Reporter

Step = Callable[[Any], Any]
"""`batch -> output`: the step as the loop calls it."""


class RunMonitor:
    """The sections and exceptions of one run."""

    def __init__(self, reporter: Reporter, activity: RankActivity, state: State) -> None:
        self._reporter = reporter
        self._activity = activity
        self._state = state

    def saw(self, error: BaseException) -> None:
        """An exception ends the run, unless a handler ends it well."""
        self._reporter.seen(error)

    def ended_well(self) -> None:
        """A handler ended the run well all the same."""
        self._reporter.withdraw()

    def iterate(self, data: Any) -> Iterator[Any]:
        """`iter(data)`, whose every reading is the section "data"."""
        enter, section = self._activity.enter, "evaluation" if self._activity.nested else "data"
        enter(section)
        return _MonitoredIterator(iter(data), enter, section)

    def step(self, step: Step) -> Step:
        """The step, as the section of that name."""
        state, begins, enter, reporter = self._state, self._activity.step_begins, self._activity.enter, self._reporter

        def outermost(batch: Any) -> Any:
            if reporter.has_seen:  # an exception of an inner engine, which a handler or the step caught
                reporter.withdraw()
            begins(state.epoch, state.iteration)
            return step(batch)

        def inside_another(batch: Any) -> Any:
            enter("evaluation")
            return step(batch)

        return inside_another if self._activity.nested else outermost

    def fire(self, fire: Callable[..., None]) -> Callable[..., None]:
        """The firing of events that somebody listens to, as the section "handler"."""
        activity = self._activity

        def firing(event: Any, *arguments: Any) -> None:
            activity.enter("evaluation" if activity.nested else "handler")
            fire(event, *arguments)

        return firing


@contextmanager
def monitored(name: str, state: State) -> Iterator[RunMonitor | None]:
    """The run of an engine called `name`: what it raises is reported, if there is anybody to report to.

    A run that is in no other one's step or handler is in the summary at the job's end.
    """
    world = World.current()
    if world is None:
        yield None
        return
    inner, is_outermost = internals(world), not is_nested()
    with _reported(inner, name, state) as monitor:
        yield monitor
    if is_outermost:
        inner.summary[name.rpartition(".")[2]] = _in_words(state)


@contextmanager
def _reported(inner: WorldInternals, name: str, state: State) -> Iterator[RunMonitor | None]:
    reporter = inner.reporter
    if reporter is None:
        yield None
        return
    # An exception of an earlier run was caught by the script if another run begins.
    reporter.withdraw()
    with inner.activity.run(name, lambda: _goal(state)):
        try:
            yield RunMonitor(reporter, inner.activity, state)
        except BaseException as error:
            reporter.seen(error)
            raise


def _goal(state: State) -> int:
    """How many iterations the run is to have, by what is known so far; 0 where that is not known."""
    if state.max_iters is not None:
        return state.max_iters
    return (state.max_epochs or 0) * (state.epoch_length or 0)


def _in_words(state: State) -> str:
    """How far a run came, for the summary at the job's end."""
    epochs = f"{state.epoch} epoch{'' if state.epoch == 1 else 's'}"
    words = f"{epochs}, {state.iteration} iteration{'' if state.iteration == 1 else 's'}"
    if took := state.times.get(Events.COMPLETED.name):
        words += f" in {took_in_words(took)}"
    return words if state.stop_reason is None else f"{words}, ended by {state.stop_reason}"


class _MonitoredIterator:
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


_inside_a_run: ContextVar[bool] = ContextVar("allstep_inside_a_run", default=False)

_STRIKES: tuple[tuple[Events, When], ...] = (
    (Events.GET_BATCH_STARTED, "data"),
    (Events.ITERATION_COMPLETED, "handler"),
)


@contextmanager
def fault_injection(run: Run, registry: Registry) -> Iterator[None]:
    """Have the plan's faults strike before batches and after steps. A rank that is to leave early ends the body."""
    if not faults.active() or is_nested():
        yield
        return
    for event, when in _STRIKES:
        registry.add(event, _strike_around_step, run, when)
    try:
        yield
    except LeftEarly:
        pass
    finally:
        for event, _ in _STRIKES:
            registry.remove(_strike_around_step, event)


def is_nested() -> bool:
    """Whether an engine is running around this place, in whose step or handler it is."""
    return _inside_a_run.get()


@contextmanager
def nesting() -> Iterator[None]:
    """A run: engines that are run in its body are nested."""
    token = _inside_a_run.set(True)
    try:
        yield
    finally:
        _inside_a_run.reset(token)


def with_faults(run: Run, step: Step) -> Step:
    """The step of a run that begins; where there is a plan, faults strike in it before its own work."""
    if not faults.active() or is_nested():
        return step
    return lambda batch: step(_strike(run, "step", batch))


def _strike_around_step(run: Run, when: When) -> None:
    _strike(run, when)


def _strike(run: Run, when: When, batch: Any = None) -> Any:
    state, world = run.state, World.current()
    rank = run.coordinator.rank if world is None else world.rank
    attempt = 0 if world is None else world.placement.attempt
    iteration = state.iteration + (when == "data")
    if when == "data" and world is not None:
        internals(world).activity.enter("data")
    position = faults.RankPosition(when, rank, attempt, state.epoch, iteration)
    return faults.strike(position, batch, flip=lambda flipped: flip_bit(run.modules, flipped))
