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
from contextlib import ExitStack
from time import perf_counter
from typing import TYPE_CHECKING, Any

from allstep.coordination import Request
from allstep.engine.agreed import AgreedFeed
from allstep.engine.events import EventEnum, Events
from allstep.engine.filler import without_gradient, without_reduction, without_trace
from allstep.engine.meeting import Meeting
from allstep.engine.reader import make_reader
from allstep.engine.source import END, Source, place_in_data
from allstep.engine.terms import is_done, length_of
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
    `until` is the iteration after which there is more to decide than which handlers are due. `takes_batches` says that
    a pass is open, so that ranks that agree have to vote before another's data is taken.
    """

    def __init__(self, engine: Engine, meeting: Meeting | None, *, continues: bool) -> None:
        self.engine = engine
        self.state = engine.state
        self.until: float = LOOK_NOW
        self.agreed: AgreedFeed | None = None
        self._slots = engine.registry.slots
        self._asked = engine.asked
        self._step = engine.process_function
        self._meeting = meeting
        if meeting is not None:
            self.agreed = AgreedFeed(engine.coordinator, meeting.agreement, engine.state, engine.requests)
            self._modules = engine.modules_in_step()
            self._step = self._agreed_step
        self._continues = continues
        self._dry = False
        self._pass_began_at = 0
        self.takes_batches = False
        self._source = Source(engine.state.dataloader)
        self._feed: Any = None
        self._replaced = False
        self._unused, engine.kept = engine.kept, []

    def replace_data(self, data: Any) -> None:
        """Take batches from `data` from the next one on."""
        self._continues = False
        self._source, self._feed, self.takes_batches, self._unused = Source(data), None, False, []
        if self.engine.progress.epoch_is_open:
            self._source.set_epoch(self.state.epoch - 1)
            if self.agreed is None:
                self._open()
                self._look_ahead()

    def drive(self) -> Generator[None, None, None]:
        """Run to the end; yield where the run is suspended."""
        began = perf_counter()
        try:
            yield from self._run()
            self._conclude(began)
        except GeneratorExit:
            self._keep_unused()
            raise
        except BaseException as error:
            self.engine.logger.error("the run ends at iteration %d: %r", self.state.iteration, error)
            self._asked.clear()
            earlier = len(self.engine.requests)
            self._announce(Events.EXCEPTION_RAISED, error)
            if self.engine.coordinator.world_size == 1:  # with nobody to vote, a handler's word is enough
                for asked in self.engine.requests[earlier:]:
                    self.engine.take(asked)
            if Request.TERMINATE not in self._asked:
                self._keep_unused()
                raise
            self._conclude(began)
        self._keep_unused()

    def _run(self) -> Generator[None, None, None]:
        self.state.times.update({Events.EPOCH_COMPLETED.name: 0.0, Events.COMPLETED.name: 0.0})
        self._announce(Events.STARTED)
        if self._asked:
            yield from self._heed()
        while Request.TERMINATE not in self._asked and not self._is_done():
            if self.state.iteration and self._is_one_shot() and not self._has_another_epoch():
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
            self._open_or_go_on()
            if not (asked and (yield from self._heed())):
                yield from self._iterate()
        if Request.TERMINATE in asked:
            return
        progress.step_is_open = False
        iterations = state.iteration - progress.epoch_began_at
        cut = Request.TERMINATE_EPOCH in asked
        if cut:
            self._announce(Events.TERMINATE_SINGLE_EPOCH, iterations)
            self._abandon_pass()
        progress.epoch_is_open = False
        progress.epoch_began_at = state.iteration
        if self._dry and not iterations:
            return
        if not (cut and self.engine.skips_epoch_completed):
            state.times[Events.EPOCH_COMPLETED.name] = perf_counter() - began
            self._announce(Events.EPOCH_COMPLETED)
        self._close_epoch()
        asked.discard(Request.TERMINATE_EPOCH)  # one that came too late for this epoch is not for the next
        state.times[Events.EPOCH_COMPLETED.name] = perf_counter() - began
        if asked:
            yield from self._heed()

    def _iterate(self) -> Generator[None, None, None]:
        engine, state, asked, progress = self.engine, self.state, self._asked, self.engine.progress
        fire, step = engine._fire_event, self._step
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
                    self._go_to_next_window()
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
        if self.agreed is not None:
            self.agreed.limit = ends_at
            if self._feed is not None:
                ends_at = min(ends_at, self.agreed.window_ends_at)
        self.until = LOOK_NOW if self._asked else ends_at

    def _open_or_go_on(self) -> None:
        """Have batches to take, of a new pass or of the one that the last epoch left."""
        self._look_ahead()
        if self._replaced:
            self._reopen()
        elif self._feed is None:
            self._open()
        elif self.agreed is not None:
            self.agreed.advance()
            self._land()

    def _open(self, *, is_new: bool = True) -> None:
        """Begin taking batches: where the state says, the first time in a continued run, else at a pass's beginning."""
        state, progress, skip = self.state, self.engine.progress, 0
        present = begun_in = state.epoch - progress.epoch_is_open
        if self._continues:
            length = length_of(self._source.data) if self._meeting is None else self._meeting.length
            begun_in, skip = place_in_data(
                state.iteration, progress.epoch_began_at, state.epoch_length, present, length
            )
        self._continues = False
        if begun_in != present:
            self._source.set_epoch(begun_in)
        if self._unused:
            self._source.put_back(self._unused)
            self._unused = []
        self._source.open(skip, may_end=self.agreed is not None)
        if begun_in != present:  # the pass after this one, if it begins in this epoch, is of this epoch
            self._source.set_epoch(present)
        self._begin_pass(skip, is_new=is_new)

    def _begin_pass(self, position: int = 0, *, is_new: bool = True) -> None:
        source = self._source
        assert source.batches is not None
        self.takes_batches = True
        if is_new:
            self._pass_began_at = self._taken()
        if self.agreed is None:
            self._feed = source.batches
        else:
            self._feed = self.agreed
            self.agreed.open_pass(make_reader(source.data, source.batches, position, self.engine.samples_in))
            self._land()

    def _restart(self) -> None:
        ended = self._source
        self.takes_batches = False
        if self.agreed is not None:
            unused = self.agreed.end_pass(loses_unread=not ended.is_one_shot)
            if ended.is_one_shot:
                self._unused = unused
        self._announce(Events.DATALOADER_STOP_ITERATION)
        if self._unused:
            self._source.put_back(self._unused)
            self._unused = []
        if self._source is ended or self._feed is None:
            self._source.open()
        self._begin_pass()

    def _taken(self) -> int:
        return self.state.iteration + (self.agreed.waiting if self.agreed is not None else 0)

    def _refill(self) -> bool:
        """The pass ended: begin the next, or learn the epoch's length. True when this epoch has more batches."""
        state = self.state
        if self._dry:
            return False
        if self._taken() == 0:
            raise DataError("data is empty: it gave no batch; give at least one" + self._who_is_empty())
        if state.epoch_length is None:
            state.epoch_length = self._taken() - self.engine.progress.epoch_began_at
        elif self._taken() > self._pass_began_at:
            self._restart()
            self._look_ahead()
            return True
        else:
            self._say_dry()
        self._look_ahead()
        return False

    def _has_another_epoch(self) -> bool:
        """Whether a one-shot iterator has anything left, asked before an epoch begins so that none is empty."""
        self._source.set_epoch(self.state.epoch)  # another rank's data may begin its pass here
        self._open_or_go_on()
        if not self._has_more():
            self._restart()
            if Request.TERMINATE in self._asked:
                return False
            if not self._has_more():
                self._say_dry()
                return False
        if self.agreed is None:
            self._begin_pass()
        return True

    def _has_more(self) -> bool:
        return self._source.has_more() if self.agreed is None else self.agreed.has_more()

    def _is_one_shot(self) -> bool:
        return self._source.is_one_shot if self._meeting is None else self._meeting.is_one_shot

    def _abandon_pass(self) -> None:
        """Begin the next epoch with a new pass; what a one-shot iterator gave is given again."""
        self._feed, self.takes_batches, self._replaced = None, False, False
        if self.agreed is not None:
            unused = self.agreed.abandon_pass()
            if self._source.is_one_shot:
                self._unused += unused

    def _keep_unused(self) -> None:
        """Keep what was read ahead of a one-shot iterator for the engine's next run over it."""
        if self.agreed is not None and self._source.is_one_shot:
            self.engine.kept = self._unused if self._feed is None else self.agreed.abandon_pass()

    def _go_to_next_window(self) -> None:
        if self.agreed is not None and self.state.iteration >= self.agreed.window_ends_at:
            self.agreed.advance()
            self._land()

    def _close_epoch(self) -> None:
        agreed, state = self.agreed, self.state
        if agreed is None:
            return
        state.unread = agreed.close_epoch()
        if state.unread and self.engine.coordinator.rank == 0:
            left = ", ".join(f"rank {u.rank}: {u.batches} batches of {u.samples} samples" for u in state.unread)
            self.engine.logger.warning("epoch %d ended when a rank ran out of data; unread: %s", state.epoch, left)
        self._land(reopens=False)

    def _land(self, *, reopens: bool = True) -> None:
        """Take what the ranks agreed to do."""
        agreed = self.agreed
        assert agreed is not None
        landed, agreed.landed = agreed.landed, []
        for asked in landed:
            self.engine.take(asked)
        if any(asked.request is Request.REPLACE_DATA for asked in landed):
            self._replaced = True
        if self._replaced and reopens and not self._asked & {Request.TERMINATE, Request.TERMINATE_EPOCH}:
            self._reopen()

    def _reopen(self) -> None:
        """Vote anew on the coming iterations, since some rank's data was replaced: for the others the pass goes on."""
        assert self.agreed is not None
        self._replaced = False
        self._look_ahead()
        if self._feed is None:
            self._open(is_new=False)
        else:
            self.agreed.open_pass()
            self._land()

    def _who_is_empty(self) -> str:
        if self.agreed is None or self.engine.coordinator.world_size == 1:
            return ""
        empty = [str(r) for r, n in enumerate(self.engine.coordinator.gather(self.agreed.total())) if n == 0]
        return f" on rank {', '.join(empty)}, or train with uneven='longest', in which it takes part at weight zero"

    def _agreed_step(self, engine: Engine, batch: Any) -> Any:
        """The step with what agreement asks of it: no trace of a filler, no reduction inside a group."""
        state = self.state
        if state.active and state.group_end and state.samples:
            return engine.process_function(engine, batch)
        if not state.active and engine.idle == "skip":
            return None
        with ExitStack() as stack:
            if not state.active:
                stack.enter_context(without_trace(self._modules))
            elif not state.samples:  # the mean over nothing is not a number
                stack.enter_context(without_gradient(self._modules))
            if not state.group_end:
                stack.enter_context(without_reduction(self._modules))
            return engine.process_function(engine, batch)

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
        if self.agreed is not None:
            self.agreed.confirm_end()
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
