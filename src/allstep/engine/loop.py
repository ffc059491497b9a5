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

from collections.abc import Generator
from contextlib import ExitStack
from time import perf_counter
from typing import TYPE_CHECKING, Any

from allstep.coordination import Request
from allstep.engine.dummy_step import without_gradient, without_reduction, without_trace
from allstep.engine.events import EventEnum, Events
from allstep.engine.handshake import Handshake
from allstep.engine.monitoring import RunMonitor, with_faults
from allstep.engine.passes import Passes
from allstep.engine.run_plan import is_done
from allstep.engine.source import END
from allstep.errors import EngineError

if TYPE_CHECKING:
    from allstep.engine.engine import Engine

LOOK_NOW = -1.0
_STOP_ITERATION = (
    "a step or a handler raised StopIteration, which would be taken for the end of data; if you call next() in it, "
    "catch StopIteration there"
)


class Loop:
    """One run of an engine, from STARTED to COMPLETED.

    `until` is the iteration after which there is more to decide than which handlers are due. `supply` is where batches
    come from. With a `watch` the world is told where the run is; without one the step and the data are used bare.
    """

    def __init__(
        self,
        engine: Engine,
        meeting: Handshake | None,
        *,
        continues: bool,
        opens_at: int | None = None,
        watch: RunMonitor | None = None,
    ) -> None:
        self.engine = engine
        self.state = engine.state
        self.until: float = LOOK_NOW
        self.supply = Passes(
            engine,
            meeting,
            continues=continues,
            opens_at=opens_at,
            announce=self._announce,
            iterate=iter if watch is None else watch.iterate,
        )
        self._slots = engine.registry.slots
        self._asked = engine.asked
        self._step = engine.process_function
        self._fire = engine._fire_event
        self._watch = watch
        if meeting is not None:
            self._modules = engine.modules_in_step()
            self._step = self._agreed_step
        self._step = with_faults(self._step)
        if watch is not None:
            self._step, self._fire = watch.step(self._step), watch.fire(self._fire)

    def replace_data(self, data: Any) -> None:
        """Take batches from `data` from the next one on."""
        self.supply.replace_data(data)
        self._look_ahead()

    def drive(self) -> Generator[None, None, None]:
        """Run to the end; yield where the run is suspended."""
        began = perf_counter()
        try:
            yield from self._run()
            self._conclude(began)
        except GeneratorExit:
            self.supply.keep_unused()
            raise
        except BaseException as error:
            if self._watch is not None:
                self._watch.saw(error)
            self.engine.logger.error("the run ends at iteration %d: %r", self.state.iteration, error)
            self._asked.clear()
            earlier = len(self.engine.requests)
            self._announce(Events.EXCEPTION_RAISED, error)
            if self.engine.coordinator.world_size == 1:  # with nobody to vote, a handler's word is enough
                for asked in self.engine.requests[earlier:]:
                    self.engine.take(asked)
            if Request.TERMINATE not in self._asked:
                self.supply.keep_unused()
                raise
            if self._watch is not None:
                self._watch.ended_well()
            self._conclude(began)
        self.supply.keep_unused()

    def _run(self) -> Generator[None, None, None]:
        self.state.times.update({Events.EPOCH_COMPLETED.name: 0.0, Events.COMPLETED.name: 0.0})
        self._announce(Events.STARTED)
        if self._asked:
            yield from self._heed()
        while Request.TERMINATE not in self._asked and not self._is_done():
            if self.state.iteration and self.supply.is_one_shot and not self.supply.has_another_epoch():
                break
            yield from self._epoch()
            if self.supply.is_dry:
                break

    def _epoch(self) -> Generator[None, None, None]:
        state, progress, asked = self.state, self.engine.progress, self._asked
        began = perf_counter()
        state.epoch += 1
        progress.epoch_is_open = True
        self.supply.set_epoch(state.epoch - 1)
        self._announce(Events.EPOCH_STARTED)
        if not (asked and (yield from self._heed())) and not self._epoch_is_over():
            self.supply.open_or_go_on()
            if not (asked and (yield from self._heed())):
                yield from self._iterate()
        if Request.TERMINATE in asked:
            return
        progress.step_is_open = False
        iterations = state.iteration - progress.epoch_began_at
        cut = Request.TERMINATE_EPOCH in asked
        if cut:
            self._announce(Events.TERMINATE_SINGLE_EPOCH, iterations)
            self.supply.abandon_pass()
        progress.epoch_is_open = False
        progress.epoch_began_at = state.iteration
        if self.supply.is_dry and not iterations:
            return
        self.supply.report_unread()
        if not (cut and self.engine.skips_epoch_completed):
            state.times[Events.EPOCH_COMPLETED.name] = perf_counter() - began
            self._announce(Events.EPOCH_COMPLETED)
        self.supply.close_epoch()
        asked.discard(Request.TERMINATE_EPOCH)  # one that came too late for this epoch is not for the next
        state.times[Events.EPOCH_COMPLETED.name] = perf_counter() - began
        if asked:
            yield from self._heed()

    def _iterate(self) -> Generator[None, None, None]:
        engine, state, asked, progress = self.engine, self.state, self._asked, self.engine.progress
        fire, step, supply = self._fire, self._step, self.supply
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
                batch = next(supply.feed, END)
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
                    supply.finish_window()
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
        ends_at = self.supply.next_stop()
        self.until = LOOK_NOW if self._asked else ends_at

    def _refill(self) -> bool:
        more = self.supply.refill()
        self._look_ahead()
        return more

    def _agreed_step(self, engine: Engine, batch: Any) -> Any:
        """The step with what agreement asks of it: no trace of a filler, no reduction inside a group."""
        state = self.state
        if state.active and state.group_end and state.samples:
            output = engine.process_function(engine, batch)
        elif not state.active and engine.idle == "skip":
            output = None
        else:
            with ExitStack() as stack:
                if not state.active:
                    stack.enter_context(without_trace(self._modules))
                elif not state.samples:  # the mean over nothing is not a number
                    stack.enter_context(without_gradient(self._modules))
                if not state.group_end:
                    stack.enter_context(without_reduction(self._modules))
                output = engine.process_function(engine, batch)
        progress = engine.progress
        progress.steps_in_group = 0 if state.group_end else progress.steps_in_group + 1
        return output

    def _is_done(self) -> bool:
        state = self.state
        completed = state.epoch - self.engine.progress.epoch_is_open
        return is_done(state.iteration, completed, state.max_epochs, state.max_iters)

    def _conclude(self, began: float) -> None:
        self.supply.confirm_end()
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
                self._fire(event, *arguments)
            except StopIteration as error:
                raise EngineError(_STOP_ITERATION) from error
