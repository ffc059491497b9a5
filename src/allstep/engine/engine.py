"""`Engine`: runs a step over data, epoch after epoch, and fires events on the way.

Contract: a user makes an engine from a step, adds handlers and calls `run`. Handlers are what it has from `Listening`,
changes of course during a run (`terminate` and the like) from `Steering`, and from `Resumable` that a run is saved with
`state_dict` and goes on in another engine where it stood. What crosses ranks goes through the engine's `Coordinator`;
the engine calls no collective. What can go wrong: bad arguments raise before anything has changed; an exception of the
user's code leaves `run` and the engine can run again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal

from torch import nn

from allstep.coordination import POLICIES, Coordinator, Uneven
from allstep.engine.extension import Extension
from allstep.engine.handshake import Handshake, RunDescription, meet
from allstep.engine.loop import Loop
from allstep.engine.monitoring import FaultInjection, RunMonitor, monitored
from allstep.engine.position import group_size_over
from allstep.engine.prefetch import SamplesIn, declared_counts
from allstep.engine.registry import Listening
from allstep.engine.resume import Resumable
from allstep.engine.run import Progress
from allstep.engine.run_plan import (
    RunArguments,
    RunTerms,
    asks_for_more,
    check_accumulation,
    check_agreement,
    check_choice,
    check_step,
    is_done,
    length_of,
    settle_terms,
)
from allstep.engine.source import END
from allstep.engine.state import State
from allstep.errors import DataError, EngineError
from allstep.world import World, internals


class Engine(Listening, Resumable):
    """Runs `process_function(engine, batch)` over data and fires `Events`.

    Args:
        process_function: the step; what it returns, of any type, becomes `state.output`.
        coordinator: how ranks agree; by default the current world's. `Alone()` for an engine that runs on some ranks
            only.
        accumulate: iterations whose gradients make one optimizer step. `state.weight` and `state.group_end` are set
            accordingly, and DDP reduces gradients in the last of them only.
        samples_in: `batch -> int`, what `state.weight` weighs by; by default the first dimension of the first tensor.
        uneven: the default of `run`'s argument.
        idle: what a rank does in an iteration for which it has no batch while others have: run the step on a "filler",
            at weight zero, so that collectives in the step match, or "skip" the step; events are fired in both.
        name: what this engine is called when ranks compare what they run; by default the step's name.

    Attributes:
        state: the run's `State`.
        modules: wrapped modules that the step trains, besides those from the current world's `wrap`.
        extension: what metrics, checkpoints and handlers ask of the engine besides.
        is_running: whether `run` is under way.
        logger: where the engine reports.
        should_terminate: whether the run is to end; as `should_terminate_single_epoch` and `should_interrupt`.
    """

    def __init__(
        self,
        process_function: Callable[[Any, Any], Any],
        *,
        coordinator: Coordinator | None = None,
        accumulate: int = 1,
        samples_in: SamplesIn | None = None,
        uneven: Uneven = "shortest",
        idle: Literal["filler", "skip"] = "filler",
        name: str | None = None,
    ) -> None:
        Listening.__init__(self, State())
        Resumable.__init__(self, coordinator, accumulate)
        check_step(process_function)
        check_choice("uneven", uneven, POLICIES)
        check_choice("idle", idle, ("filler", "skip"))
        self.process_function = process_function
        self.samples_in = samples_in
        self.uneven = uneven
        self.idle = idle
        self.name = name or str(getattr(process_function, "__qualname__", type(process_function).__qualname__))
        self.modules: list[nn.Module] = []
        self.extension = Extension(self)
        self.logger = logging.getLogger("allstep.engine")
        self.kept: list[Any] = []

    def run(
        self,
        data: Any = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
        *,
        uneven: Uneven | None = None,
        window: int | None = None,
        lookahead: int | None = None,
    ) -> State:
        """Run the step over `data` until the epochs or iterations are done, or somebody ends the run.

        A finished engine begins anew, unless a larger `max_epochs` or `max_iters` lets it go on; one that was
        interrupted, failed or loaded a state goes on. A loaded state that is finished already returns at once, as does
        one that was ended as finished, unless it is asked for more epochs or iterations than then.

        Args:
            data: an iterable of batches, or None, with an `epoch_length`, for batches of None. Data shorter than the
                epoch is iterated again within it, longer data goes on in the next epoch.
            max_epochs: epochs to run, 1 by default.
            max_iters: iterations to run, instead of `max_epochs`.
            epoch_length: iterations in an epoch; by default `len(data)`, else learnt when the data first ends. With
            several ranks it is the same on all: the least of their lengths, under "longest" the greatest.
            uneven: what ends a pass over the data when ranks have different numbers of batches: the first rank without
                one ("shortest"), the last one, the others taking part at weight zero ("longest"), or an error on all
                ranks ("error"). By default the engine's.
            window: the most accumulation groups that ranks agree on at a time; by default up to 32. With 1 a stop that
                one rank asks for holds after the present group.
            lookahead: batches that are read ahead, where counting them needs reading; by default 4 or one group.

        Returns:
            The engine's state.

        Raises:
            ValueError: an argument is out of range or contradicts the state.
            TypeError: data is not iterable.
            DataError: the data is empty, or shorter than what a continued run has consumed.
            EngineError: the engine is running already.
            AgreementError: ranks are about to run different things, or came apart; the same on all of them.
            Exception: whatever a step, a handler or the data raised.
        """
        if self._is_running:
            raise EngineError("this engine is running; a handler that wants to run something needs another Engine")
        asked = RunArguments(max_epochs, max_iters, epoch_length, uneven or self.uneven, window, lookahead)
        with monitored(self.name, self.state) as watch:
            return self._run(data, asked, watch)

    def _run(self, data: Any, asked: RunArguments, watch: RunMonitor | None) -> State:
        state, suspended = self.state, self._drive is not None
        if suspended and state.max_epochs is None and state.max_iters is None:
            self._drop_run()
            suspended = False
        meeting, length, opens_at = None, None, None
        if not suspended:
            self._settle_counters()
            source = state.dataloader if data is None else data
            opens_at, max_iters = self._take_up(source, asked.max_iters)
            asked = replace(asked, max_iters=max_iters)
            meeting = self._meet(source, asked)
            length = _checked_length(source) if meeting is None else meeting.length
        terms = settle_terms(
            state,
            None if suspended else data,
            asked.max_epochs,
            asked.max_iters,
            asked.epoch_length,
            length=length,
            epochs_completed=state.epoch - self.progress.epoch_is_open,
            resuming=suspended or self._was_loaded,
        )
        is_finished = self._was_loaded and state.outcome == "finished" and not asks_for_more(terms, state)
        finished = state.stop_reason if is_finished else None
        if not suspended:
            self._begin(terms, data, meeting, opens_at, watch)
        elif data is not None and data is not state.dataloader:
            self.logger.warning("the run goes on with the data it was suspended with; to change it, use set_data()")
        state.epoch_length, state.max_epochs, state.max_iters = terms.epoch_length, terms.max_epochs, terms.max_iters
        if finished is not None:
            self._drop_run()
            state.stop_reason, state.outcome = finished, "finished"
            self.logger.warning("nothing to run: the run was finished: %s", finished)
            return state
        if not suspended and is_done(state.iteration, state.epoch, state.max_epochs, state.max_iters):
            self._drop_run()
            self.logger.warning(
                "nothing to run: all that was asked is done, %d epochs and %d iterations", state.epoch, state.iteration
            )
            return state
        self._was_loaded = False
        return self._go_on()

    def modules_in_step(self) -> list[nn.Module]:
        """Wrapped modules whose gradients the step's backward passes reduce over ranks."""
        world = World.current()
        known = [*(() if world is None else internals(world).wrapped_modules()), *self.modules]
        return list(dict.fromkeys(known))

    def _meet(self, data: Any, asked: RunArguments) -> Handshake | None:
        """Agree with the other ranks on the coming run; None where there is nothing to agree on."""
        group_size = group_size_over(data, self.accumulate)
        coordinator, state = self.coordinator, self.state
        check_accumulation(self.modules_in_step(), group_size)
        if coordinator.world_size == 1:
            check_agreement(asked.uneven, asked.window, asked.lookahead, group_size)
            if group_size == 1:
                return None
        terms = {
            "the engine's name": self.name,
            **asdict(asked),
            "idle": self.idle,
            "accumulate": group_size,
            "state.epoch": state.epoch,
            "state.iteration": state.iteration,
            "state.epoch_length": state.epoch_length,
            "state.max_epochs": state.max_epochs,
            "state.max_iters": state.max_iters,
        }
        is_declared = self.samples_in is None and declared_counts(data) is not None
        schema = tuple(line for reduction in self.extension.reductions for line in reduction.schema())
        hello = RunDescription(terms, length_of(data), is_declared, hasattr(data, "__next__"), schema)
        return meet(
            coordinator,
            hello,
            policy=asked.uneven,
            group_size=group_size,
            window=1 if coordinator.world_size == 1 else asked.window,
            lookahead=asked.lookahead,
            needs_fillers=self.idle == "filler",
        )

    def _begin(
        self, terms: RunTerms, data: Any, meeting: Handshake | None, opens_at: int | None, watch: RunMonitor | None
    ) -> None:
        state = self.state
        if data is None and not terms.fresh:
            data = state.dataloader
        is_spent = hasattr(data, "__next__") and data is state.dataloader
        state.dataloader = data
        if terms.fresh:
            state.iteration = state.epoch = 0
            self.progress = Progress()
        if not is_spent:
            self.kept = []
        state.weight, state.group_end, state.active, state.samples = 1.0, True, True, None
        state.unread, state.stop_reason, state.outcome = (), None, None
        self._forget_requests()
        world = World.current()
        state.seed = None if world is None else world.seed
        self.registry.schedule(state)
        self._own_data_state = END
        continues = not terms.fresh and not is_spent
        self._loop = Loop(self, meeting, continues=continues, opens_at=opens_at, watch=watch)
        self._drive = self._loop.drive()

    def _go_on(self) -> State:
        assert self._drive is not None
        self._is_running = True
        try:
            with FaultInjection(self):
                next(self._drive)
        except StopIteration:
            self._drop_run()
            leaving, self.extension.leaving = self.extension.leaving, None
            if leaving is not None:
                raise leaving from None
        except BaseException:
            self._drop_run()
            raise
        finally:
            self._is_running = False
        return self.state


def _checked_length(data: Any) -> int | None:
    length = length_of(data)
    if length == 0:
        raise DataError(f"data is empty: len({type(data).__name__}) is 0; give at least one batch")
    return length
