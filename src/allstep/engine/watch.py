"""Telling the world's pulse where a run is, for whoever watches over the ranks.

Contract: a run has a `Watch` where its world has a client of the control channel, and none otherwise, so that a run
which nobody watches is the bare loop. `iterate`, `step` and `fire` stand in for `iter`, the step and the firing of
events: each says which section begins, then does the same. The run of an engine inside another's is an "evaluation" to
its outer run, whose place (epoch and iteration) stays the rank's. Cost: half a microsecond an iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from allstep.channel.pulse import Pulse
from allstep.engine.state import State
from allstep.world import World
from allstep.world.reporting import Reporter

Step = Callable[[Any, Any], Any]


class Watch:
    """The sections and exceptions of one run."""

    def __init__(self, reporter: Reporter, pulse: Pulse, state: State) -> None:
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
def watched(name: str, state: State) -> Iterator[Watch | None]:
    """The run of an engine called `name`: what it raises is reported, if there is anybody to report to."""
    world = World.current()
    if world is None or world.reporter is None:
        yield None
        return
    reporter = world.reporter
    reporter.withdraw()
    with world.pulse.run(name):
        try:
            yield Watch(reporter, world.pulse, state)
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
