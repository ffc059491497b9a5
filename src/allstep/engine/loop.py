"""The loop, written once: epochs, iterations, and the events between them.

Contract: `Engine.run` makes a `Loop` and drives it. `drive` is a generator because a run can be suspended: it yields
where `interrupt()` took hold and goes on from there when the engine is run again. Before it starts, the engine's state
holds settled terms. When it ends, by return or by an exception, the state tells how far it came and the engine can run
again. An exception of the step, of a handler or of the data leaves `drive` as it is, unless a handler of
EXCEPTION_RAISED terminates the run.

In short::

    STARTED
    until the epochs or iterations asked for are done:
        EPOCH_STARTED
        until the epoch's length is reached, or the data ends when the length is not known:
            GET_BATCH_STARTED, the next batch, GET_BATCH_COMPLETED
            ITERATION_STARTED, the step, ITERATION_COMPLETED
        EPOCH_COMPLETED
    COMPLETED

An iteration costs one comparison an event (`slot.due`) and one (`until`) for all reasons to leave the inner loop.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator
from time import perf_counter
from typing import TYPE_CHECKING, Any

from allstep.coordination import Request
from allstep.engine.events import EventEnum, Events
from allstep.engine.groups import GroupFeed
from allstep.engine.source import END, Source, place_in_data
from allstep.engine.terms import is_done
from allstep.errors import DataError, EngineError

if TYPE_CHECKING:
    from allstep.engine.engine import Engine

LOOK_NOW = -1.0
_STOP_ITERATION = (
    "a step or a handler raised StopIteration, which would be taken for the end of data; if you call next() in it, "
    "catch StopIteration there"
)


class Loop:
    """One run of an engine, from STARTED to COMPLETED.

    `continues` says that the state is not at a pass's beginning, so that the first pass is opened where it stands.
    `until` is the iteration after which there is more to decide than which handlers are due.
    """

    def __init__(self, engine: Engine, *, continues: bool) -> None:
        self.engine = engine
        self.state = engine.state
        self.until: float = LOOK_NOW
        self._slots = engine.registry.slots
        self._asked = engine.asked
        self._continues = continues
        self._dry = False
        self._pass_began_at = 0
        self._groups: GroupFeed | None = None
        self._take_from(engine.state.dataloader)

    def replace_data(self, data: Any) -> None:
        """Take batches from `data` from the next one on."""
        self._continues = False
        self._take_from(data)
        if self.engine.progress.epoch_is_open:
            self._source.set_epoch(self.state.epoch - 1)
            self._open()
            self._look_ahead()

    def _take_from(self, data: Any) -> None:
        engine = self.engine
        self._source = Source(data)
        if self._groups is not None:
            self._groups.source = self._source
        elif engine.accumulate > 1:
            self._groups = GroupFeed(self._source, engine.accumulate, engine.samples_in, self.state)
        self._feed: Any = None

    def drive(self) -> Generator[None, None, None]:
        """Run to the end; yield where the run is suspended."""
        began = perf_counter()
        try:
            yield from self._run()
            self._conclude(began)
        except GeneratorExit:
            raise
        except BaseException as error:
            self.engine.logger.error("the run ends at iteration %d: %r", self.state.iteration, error)
            self._asked.clear()
            self._announce(Events.EXCEPTION_RAISED, error)
            if Request.TERMINATE not in self._asked:
                raise
            self._conclude(began)

    def _run(self) -> Generator[None, None, None]:
        self.state.times.update({Events.EPOCH_COMPLETED.name: 0.0, Events.COMPLETED.name: 0.0})
        self._announce(Events.STARTED)
        if self._asked:
            yield from self._heed()
        while Request.TERMINATE not in self._asked and not self._is_done():
            if self.state.iteration and self._source.is_one_shot and not self._has_another_epoch():
                break
            yield from self._epoch()
            if self._dry:
                break

    def _epoch(self) -> Generator[None, None, None]:
        state, progress, asked = self.state, self.engine.progress, self._asked
        began = perf_counter()
        state.epoch += 1
        progress.epoch_is_open = True
        self._source.set_epoch(state.epoch - 1)
        self._announce(Events.EPOCH_STARTED)
        if not (asked and (yield from self._heed())) and not self._epoch_is_over():
            if self._feed is None:
                self._open()
            yield from self._iterate()
        if Request.TERMINATE in asked:
            return
        progress.step_is_open = False
        iterations = state.iteration - progress.epoch_began_at
        cut = Request.TERMINATE_EPOCH in asked
        if cut:
            self._announce(Events.TERMINATE_SINGLE_EPOCH, iterations)
            self._feed = None
            if self._groups is not None:
                self._groups.clear()
        progress.epoch_is_open = False
        progress.epoch_began_at = state.iteration
        if self._dry and not iterations:
            return
        if not (cut and self.engine.skips_epoch_completed):
            state.times[Events.EPOCH_COMPLETED.name] = perf_counter() - began
            self._announce(Events.EPOCH_COMPLETED)
        asked.discard(Request.TERMINATE_EPOCH)
        state.times[Events.EPOCH_COMPLETED.name] = perf_counter() - began
        if asked:
            yield from self._heed()

    def _iterate(self) -> Generator[None, None, None]:
        engine, state, asked, progress = self.engine, self.state, self._asked, self.engine.progress
        fire, step = engine._fire_event, engine.process_function
        getting, got = self._slots[Events.GET_BATCH_STARTED], self._slots[Events.GET_BATCH_COMPLETED]
        started, completed = self._slots[Events.ITERATION_STARTED], self._slots[Events.ITERATION_COMPLETED]
        done = state.iteration
        self._look_ahead()
        refilled = False
        try:
            while True:
                state.batch = None  # not kept alive while the next is made
                if getting.due <= state.iteration and not refilled and state.dataloader is not None:
                    fire(Events.GET_BATCH_STARTED)
                    if asked and (yield from self._heed()):
                        return
                batch = next(self._feed, END)
                if batch is END:
                    if not self._refill() or (asked and (yield from self._heed())):
                        return
                    refilled = True
                    continue
                refilled = False
                state.batch = batch
                state.output = None  # not before: where the data ends, the last output is the epoch's
                if got.due <= state.iteration and state.dataloader is not None:
                    fire(Events.GET_BATCH_COMPLETED)
                    if asked and (yield from self._heed()):
                        return
                    batch = state.batch
                state.iteration = iteration = state.iteration + 1
                if started.due <= iteration:
                    progress.step_is_open = True
                    fire(Events.ITERATION_STARTED)
                    if asked and (yield from self._heed()):
                        return
                    progress.step_is_open = False
                    batch = state.batch
                state.output = step(engine, batch)
                done = iteration
                if completed.due <= iteration:
                    fire(Events.ITERATION_COMPLETED)
                if iteration >= self.until:
                    if asked and (yield from self._heed()):
                        return
                    if self._epoch_is_over():
                        return
                    self._look_ahead()
        except BaseException as error:
            progress.step_is_open = done < state.iteration
            if isinstance(error, StopIteration):
                raise EngineError(_STOP_ITERATION) from error
            raise

    def _heed(self) -> Generator[None, None, bool]:
        """Act on what was asked for; True when the epoch ends here."""
        ends = {Request.TERMINATE, Request.TERMINATE_EPOCH}
        if Request.INTERRUPT in self._asked and not self._asked & ends:
            self._asked.discard(Request.INTERRUPT)
            self._announce(Events.INTERRUPT)
            yield
            self._look_ahead()
        return bool(self._asked & ends)

    def _epoch_is_over(self) -> bool:
        state = self.state
        done = state.iteration - self.engine.progress.epoch_began_at
        if state.epoch_length is not None and done >= state.epoch_length:
            return True
        if state.max_iters is not None and state.iteration >= state.max_iters:
            self._asked.add(Request.TERMINATE)
            return True
        return False

    def _look_ahead(self) -> None:
        """Bring `until` up to date with the state and with what was asked."""
        state = self.state
        ends_at = math.inf
        if state.epoch_length is not None:
            ends_at = self.engine.progress.epoch_began_at + state.epoch_length
        if state.max_iters is not None:
            ends_at = min(ends_at, state.max_iters)
        if self._groups is not None:
            self._groups.limit = ends_at
        self.until = LOOK_NOW if self._asked else ends_at

    def _open(self) -> None:
        """Begin taking batches: where the state says, the first time in a continued run, else at a pass's beginning."""
        state, progress, skip = self.state, self.engine.progress, 0
        present = begun_in = state.epoch - progress.epoch_is_open
        if self._continues:
            began_at = progress.epoch_began_at
            begun_in, skip = place_in_data(state.iteration, began_at, state.epoch_length, present, self._source.data)
        self._continues = False
        if begun_in != present:
            self._source.set_epoch(begun_in)
        self._source.open(skip)
        if begun_in != present:  # the pass after this one, if it begins in this epoch, is of this epoch
            self._source.set_epoch(present)
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._feed = self._source.batches if self._groups is None else self._groups
        self._pass_began_at = self._taken()

    def _restart(self) -> None:
        ended = self._source
        self._announce(Events.DATALOADER_STOP_ITERATION)
        if self._source is ended or self._feed is None:
            self._source.open()
        self._begin_pass()

    def _taken(self) -> int:
        return self.state.iteration + (self._groups.pending if self._groups is not None else 0)

    def _refill(self) -> bool:
        """The pass ended: begin the next, or learn the epoch's length. True when this epoch has more batches."""
        state, groups = self.state, self._groups
        if self._dry:
            return False
        if self._taken() == 0:
            raise DataError("data is empty: it gave no batch; give at least one")
        if state.epoch_length is None:
            state.epoch_length = self._taken() - self.engine.progress.epoch_began_at
        elif self._taken() > self._pass_began_at:
            self._restart()
            return True
        else:
            self._say_dry()
        self._look_ahead()
        if groups is not None and groups.pending:
            groups.close_group()
            return True
        return False

    def _has_another_epoch(self) -> bool:
        """Whether a one-shot iterator has anything left, asked before an epoch begins so that none is empty."""
        if self._feed is None:
            self._open()
        if not self._source.has_more():
            self._restart()
            if Request.TERMINATE in self._asked:
                return False
            if not self._source.has_more():
                self._say_dry()
                return False
        self._begin_pass()
        return True

    def _say_dry(self) -> None:
        state = self.state
        total = state.max_iters
        if total is None and state.epoch_length is not None and state.max_epochs is not None:
            total = state.epoch_length * state.max_epochs
        self._dry = True
        warnings.warn(
            f"the data ran dry: {self._taken()} of {total} iterations were done; give data that can be iterated again, "
            "or new data with engine.set_data() in a handler of DATALOADER_STOP_ITERATION",
            stacklevel=2,
        )

    def _is_done(self) -> bool:
        state = self.state
        completed = state.epoch - self.engine.progress.epoch_is_open
        return is_done(state.iteration, completed, state.max_epochs, state.max_iters)

    def _conclude(self, began: float) -> None:
        if Request.TERMINATE in self._asked:
            self._announce(Events.TERMINATE)
        self.state.times[Events.COMPLETED.name] = perf_counter() - began
        if not self.engine.skips_completed:
            self._announce(Events.COMPLETED)
        self.state.times[Events.COMPLETED.name] = perf_counter() - began

    def _announce(self, event: EventEnum, *arguments: Any) -> None:
        slot = self._slots[event]
        if slot.due <= (getattr(self.state, slot.attribute) if slot.attribute else 0):
            try:
                self.engine._fire_event(event, *arguments)
            except StopIteration as error:
                raise EngineError(_STOP_ITERATION) from error
