"""The loop, written once: epochs, iterations, and the events between them.

Contract: `Engine.run` makes a `RunLoop` and drives it. `drive` is a generator because a run can be suspended: it yields
where `interrupt()` took hold and goes on from there when the engine is run again. Before it starts, the run's state
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

An iteration costs one comparison an event (`slot.due`) and one (`run.until`) for all reasons to leave the inner loop.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from allstep.coordination import RequestKind
from allstep.engine.cancellation import cancelled
from allstep.engine.control import land, take_notice
from allstep.engine.events import EventEnum, Events
from allstep.engine.monitoring import RunMonitor
from allstep.engine.passes import Passes
from allstep.engine.registry import HandlerSlot
from allstep.engine.run import LOOK_NOW, Run, UnfinishedEvent
from allstep.engine.run_plan import is_done
from allstep.engine.skipping import end_skip
from allstep.engine.source import END
from allstep.errors import EngineError

_ENDS = {RequestKind.TERMINATE, RequestKind.TERMINATE_EPOCH}
_STOP_ITERATION = (
    "a step or a handler raised StopIteration, which would be taken for the end of data; if you call next() in it, "
    "catch StopIteration there"
)


class RunLoop:
    """One run, from STARTED to COMPLETED.

    Args:
        run: the record of the run.
        passes: where batches come from.
        step: `batch -> output`.
        fire: `(event, *arguments)`: calls the handlers of an event that are due.
        finish: `(event)`: calls those of them that an exception has left.
        slots: the handlers of each event, and when the first of them is due.
        monitor: who is told of exceptions; None without.
    """

    def __init__(
        self,
        run: Run,
        passes: Passes,
        *,
        step: Callable[[Any], Any],
        fire: Callable[..., None],
        finish: Callable[[EventEnum], None],
        slots: Mapping[Any, HandlerSlot],
        monitor: RunMonitor | None,
    ) -> None:
        self._run = run
        self._passes = passes
        self._step = step
        self._fire = fire
        self._finish = finish
        self._slots = slots
        self._monitor = monitor
        self._told: BaseException | None = None

    def drive(self) -> Generator[None, None, None]:
        """Run to the end; yield where the run is suspended."""
        run, began = self._run, perf_counter()
        try:
            yield from self._epochs()
            self._conclude(began)
        except GeneratorExit:
            # The suspended run is dropped: another one begins, or a state is loaded.
            self._passes.keep_unused()
            raise
        except BaseException as error:
            run.has_failed = True
            # What was asked before is void: only a handler of the exception may end the run well.
            run.holding.clear()
            earlier = len(run.requests)
            survives = self._tell_of(error)
            if run.coordinator.world_size == 1:  # with nobody to vote, a handler's word is enough
                for request in run.requests[earlier:]:
                    land(run, request)
            ends_well = RequestKind.TERMINATE in run.holding
            if not ends_well and not survives:
                self._passes.keep_unused()
                raise
            if self._monitor is not None:
                self._monitor.ended_well()
            if ends_well:
                self._conclude(began)
        finally:
            self._told = None  # it knows this frame, and so its own keeper
        self._passes.keep_unused()

    def _tell_of(self, error: BaseException) -> bool:
        """Tell of an exception, once; True when the run is to go on after it."""
        run = self._run
        if error is self._told:
            return False
        # Before any handler: what a handler raises or waits for must not hide the first cause.
        if self._monitor is not None:
            self._monitor.saw(error)
        run.logger.error("the run ends at iteration %d: %r", run.state.iteration, error)
        self._told = error
        try:
            self._announce(Events.EXCEPTION_RAISED, error)
        except BaseException as another:
            self._told = another
            raise
        return run.survives is not None and run.handshake is None and run.survives(error)

    def _epochs(self) -> Generator[None, None, None]:
        run, passes = self._run, self._passes
        run.state.times.update({Events.EPOCH_COMPLETED.name: 0.0, Events.COMPLETED.name: 0.0})
        self._announce(Events.STARTED)
        if run.holding:
            yield from self._heed()
        if run.unfinished is not None and run.unfinished.event is Events.EPOCH_COMPLETED:
            yield from self._finish_epoch()
        while RequestKind.TERMINATE not in run.holding and (run.unfinished is not None or not self._is_done()):
            # Not before the first epoch: there an empty iterator is an error, and not the end of a run.
            begins = run.state.iteration and run.unfinished is None
            if begins and passes.is_one_shot and not self._has_another_epoch():
                break
            yield from self._epoch()
            if passes.is_dry:
                break

    def _epoch(self) -> Generator[None, None, None]:
        run, state, holding, passes = self._run, self._run.state, self._run.holding, self._passes
        began = perf_counter()
        state.epoch += 1
        run.epoch_is_open = True
        passes.set_epoch(state.epoch - 1)
        self._announce(Events.EPOCH_STARTED)
        if run.unfinished is not None:  # of the iteration after which the last run failed
            self._finish_event(run.unfinished)
        if not (holding and (yield from self._heed())) and not self._epoch_is_over():
            passes.open_or_go_on()
            if not (holding and (yield from self._heed())):
                self._end_step()
                yield from self._iterate()
                self._end_step()
        if RequestKind.TERMINATE in holding:
            return
        # An iteration that was begun and cut by terminate_epoch() counts as one of this epoch.
        run.step_is_open = False
        began_at, iterations = run.epoch_began_at, state.iteration - run.epoch_began_at
        cut = RequestKind.TERMINATE_EPOCH in holding
        if cut:
            self._announce(Events.TERMINATE_SINGLE_EPOCH, iterations)
            passes.abandon_pass()
        run.epoch_is_open = False
        run.epoch_began_at = state.iteration
        # The data ended before this epoch had a batch: no epoch, so nobody is told of its end.
        if passes.is_dry and not iterations:
            return
        # Before the handlers, which read state.unread; the vote on what they ask for comes after them.
        passes.report_unread()
        if not (cut and run.skips_epoch_completed):
            state.times[Events.EPOCH_COMPLETED.name] = perf_counter() - began
            with self._may_be_left(Events.EPOCH_COMPLETED, began_at, is_cut=cut):
                self._announce(Events.EPOCH_COMPLETED)
        passes.close_epoch()
        holding.discard(RequestKind.TERMINATE_EPOCH)  # one that came too late for this epoch is not for the next
        state.times[Events.EPOCH_COMPLETED.name] = perf_counter() - began
        self._end_step()
        if holding:
            yield from self._heed()

    def _iterate(self) -> Generator[None, None, None]:
        """The iterations of an epoch. All that is done for each of them is in this function."""
        run, state, holding = self._run, self._run.state, self._run.holding
        fire, step, passes = self._fire, self._step, self._passes
        getting, got = self._slots[Events.GET_BATCH_STARTED], self._slots[Events.GET_BATCH_COMPLETED]
        started, completed = self._slots[Events.ITERATION_STARTED], self._slots[Events.ITERATION_COMPLETED]
        done = state.iteration
        # Handlers of EPOCH_STARTED may have changed what the epoch is to do.
        self._look_ahead()
        refilled = False
        try:
            while True:
                state.batch = None  # not kept alive while the next is made
                if getting.due <= state.iteration and not refilled and state.dataloader is not None:
                    fire(Events.GET_BATCH_STARTED)
                    if holding and (yield from self._heed()):
                        return
                batch = next(passes.batches, END)
                if batch is END:
                    if not self._refill() or (holding and (yield from self._heed())):
                        return
                    # The next pass gives the batch for which GET_BATCH_STARTED was fired already.
                    refilled = True
                    continue
                refilled = False
                state.batch = batch
                state.output = None  # not before: where the data ends, the last output is the epoch's
                if got.due <= state.iteration and state.dataloader is not None:
                    fire(Events.GET_BATCH_COMPLETED)
                    if holding and (yield from self._heed()):
                        return
                    batch = state.batch
                state.iteration = iteration = state.iteration + 1
                if started.due <= iteration:
                    # A handler that saves or ends the run here leaves a step that was counted and did not run.
                    run.step_is_open = True
                    fire(Events.ITERATION_STARTED)
                    if holding and (yield from self._heed()):
                        return
                    run.step_is_open = False
                    batch = state.batch
                state.output = step(batch)
                # From here an exception of a handler does not undo the iteration.
                done = iteration
                if completed.due <= iteration:
                    fire(Events.ITERATION_COMPLETED)
                if iteration >= run.until:
                    end_skip(run)
                    take_notice(run)
                    passes.finish_window()
                    if holding and (yield from self._heed()):
                        return
                    if self._epoch_is_over():
                        return
                    self._look_ahead()
        except BaseException as error:
            end_skip(run, failed=True)
            # Only where the step itself, or a handler before it, raised.
            run.step_is_open = done < state.iteration
            if completed.unfinished and not run.step_is_open:
                run.unfinished = UnfinishedEvent(Events.ITERATION_COMPLETED, run.epoch_began_at)
            if isinstance(error, StopIteration):
                raise EngineError(_STOP_ITERATION) from error
            if run.survives is None or not isinstance(error, Exception) or not self._tell_of(error):
                raise
            # The iteration stays counted, and the next epoch begins a new pass as after one that was cut.
            if self._monitor is not None:
                self._monitor.ended_well()
            passes.abandon_pass()

    def _end_step(self) -> None:
        if self._run.end_step is not None:
            self._run.end_step()

    def _finish_epoch(self) -> Generator[None, None, None]:
        """Call the handlers of EPOCH_COMPLETED that an exception has left, and end the epoch as ever."""
        assert self._run.unfinished is not None
        self._finish_event(self._run.unfinished)
        self._passes.close_epoch()
        self._run.holding.discard(RequestKind.TERMINATE_EPOCH)
        if self._run.holding:
            yield from self._heed()

    def _finish_event(self, left: UnfinishedEvent) -> None:
        self._run.unfinished = None
        with self._may_be_left(left.event, left.epoch_began_at, is_cut=left.is_cut):
            self._finish(left.event)

    @contextmanager
    def _may_be_left(self, event: Events, epoch_began_at: int, *, is_cut: bool) -> Iterator[None]:
        """Note what is left of an event, when one of its handlers raises in the body."""
        try:
            yield
        except BaseException:
            if self._slots[event].unfinished:
                self._run.unfinished = UnfinishedEvent(event, epoch_began_at, is_cut)
            raise

    def _refill(self) -> bool:
        """The pass has ended. True when this epoch has more batches."""
        has_more = self._passes.end_pass()
        if has_more:
            self._announce(Events.DATALOADER_STOP_ITERATION)
            self._passes.begin_next()
        self._look_ahead()
        return has_more

    def _has_another_epoch(self) -> bool:
        """Whether a one-shot iterator has anything left, asked before an epoch begins so that none is empty."""
        passes = self._passes
        passes.look_for_another_epoch()
        while not passes.has_more():
            passes.leave_pass()
            self._announce(Events.DATALOADER_STOP_ITERATION)
            passes.begin_next()
            if RequestKind.TERMINATE in self._run.holding:
                return False
            if not passes.has_more() and not passes.has_waiting():
                passes.say_dry()
                return False
        return True

    def _heed(self) -> Generator[None, None, bool]:
        """Act on what holds; True when the epoch ends here."""
        holding = self._run.holding
        self._passes.take_new_data()
        if RequestKind.INTERRUPT in holding and not holding & _ENDS:
            holding.discard(RequestKind.INTERRUPT)
            self._announce(Events.INTERRUPT)
            yield
            self._passes.take_new_data()  # given while the run was suspended
            self._look_ahead()
        return bool(holding & _ENDS)

    def _look_ahead(self) -> None:
        """Bring `run.until` up to date with the state and with what holds."""
        run = self._run
        run.until = LOOK_NOW if run.holding or run.skipped is not None else self._passes.next_stop()
        if run.notice is not None:  # it may have come between the line above and its assignment
            run.until = LOOK_NOW

    def _epoch_is_over(self) -> bool:
        run, state = self._run, self._run.state
        if state.iteration >= run.epoch_ends_at:
            return True
        if state.max_iters is not None and state.iteration >= state.max_iters:
            run.holding.add(RequestKind.TERMINATE)
            return True
        return False

    def _is_done(self) -> bool:
        state = self._run.state
        return is_done(state.iteration, self._run.epochs_completed, state.max_epochs, state.max_iters)

    def _conclude(self, began: float) -> None:
        times = self._run.state.times
        self._passes.confirm_end()
        if RequestKind.TERMINATE in self._run.holding:
            self._announce(Events.TERMINATE)
        # For the handlers of COMPLETED to read; their own time is added behind them.
        times[Events.COMPLETED.name] = perf_counter() - began
        if not self._run.skips_completed:
            self._announce(Events.COMPLETED)
        times[Events.COMPLETED.name] = perf_counter() - began
        if self._run.state.outcome == "cancelled" and self._run.leaving is None:
            self._run.leaving = cancelled(self._run.state.stop_reason)

    def _announce(self, event: EventEnum, *arguments: Any) -> None:
        slot = self._slots[event]
        if slot.due <= (getattr(self._run.state, slot.attribute) if slot.attribute else 0):
            try:
                self._fire(event, *arguments)
            except StopIteration as error:
                raise EngineError(_STOP_ITERATION) from error
