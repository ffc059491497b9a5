"""`Engine`: runs a step over data, epoch after epoch, and fires events on the way.

Contract: a user makes an engine from a step, adds handlers and calls `run`. Between runs the state may be saved with
`state_dict` and loaded into another engine, which then goes on where the first one stood. During a run, handlers and
the step may ask for a change of course (`terminate`, `terminate_epoch`, `interrupt`, `set_data`). What crosses ranks
goes through the engine's `Coordinator`; the engine calls no collective. What can go wrong: bad arguments raise before
anything has changed; an exception of the user's code leaves `run` and the engine can run again.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Generator, Mapping
from typing import Any

from allstep.coordination import Alone, Coordinator, Request
from allstep.engine.groups import SamplesIn, count_samples
from allstep.engine.listening import Listening
from allstep.engine.loop import LOOK_NOW, Loop
from allstep.engine.progress import Progress, place_from
from allstep.engine.state import State
from allstep.engine.terms import Terms, is_done, settle_terms
from allstep.errors import EngineError
from allstep.world import World


class Engine(Listening):
    """Runs `process_function(engine, batch)` over data and fires `Events`.

    Args:
        process_function: the step; what it returns, of any type, becomes `state.output`.
        coordinator: how ranks agree; by default the current world's. `Alone()` for an engine that runs on some ranks
            only.
        accumulate: iterations whose gradients make one optimizer step. `state.weight` and `state.group_end` are set
            accordingly; such an engine reads one group of batches ahead.
        samples_in: `batch -> int`, what `state.weight` weighs by; by default the first dimension of the first tensor.

    Attributes:
        state: the run's `State`.
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
    ) -> None:
        super().__init__(State())
        _check_step(process_function)
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate is {accumulate!r}; it must be an int of at least 1")
        self.process_function = process_function
        self.accumulate = accumulate
        self.samples_in = samples_in or count_samples
        self.logger = logging.getLogger("allstep.engine")
        self.progress = Progress()
        self.asked: set[Request] = set()
        self.skips_completed = False
        self.skips_epoch_completed = False
        self._given_coordinator = coordinator
        self._loop: Loop | None = None
        self._drive: Generator[None, None, None] | None = None
        self._is_running = False
        self._was_loaded = False
        self._user_keys: list[str] = []

    @property
    def coordinator(self) -> Coordinator:
        """How this engine's ranks agree."""
        if self._given_coordinator is not None:
            return self._given_coordinator
        world = World.current()
        return Alone() if world is None else world.coordinator

    @property
    def should_terminate(self) -> bool:
        """Whether the run is to end."""
        return Request.TERMINATE in self.asked

    @property
    def should_terminate_single_epoch(self) -> bool:
        """Whether the epoch is to end."""
        return Request.TERMINATE_EPOCH in self.asked

    @property
    def should_interrupt(self) -> bool:
        """Whether the run is to be suspended."""
        return Request.INTERRUPT in self.asked

    def run(
        self,
        data: Any = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
    ) -> State:
        """Run the step over `data` until the epochs or iterations are done, or somebody ends the run.

        A finished engine begins anew, unless a larger `max_epochs` or `max_iters` lets it go on; one that was
        interrupted, failed or loaded a state goes on. A loaded state that is finished already returns at once.

        Args:
            data: an iterable of batches, or None, with an `epoch_length`, for batches of None. Data shorter than the
                epoch is iterated again within it, longer data goes on in the next epoch.
            max_epochs: epochs to run, 1 by default.
            max_iters: iterations to run, instead of `max_epochs`.
            epoch_length: iterations in an epoch; by default `len(data)`, else learnt when the data first ends.

        Returns:
            The engine's state.

        Raises:
            ValueError: an argument is out of range or contradicts the state.
            TypeError: data is not iterable.
            DataError: the data is empty, or shorter than what a continued run has consumed.
            EngineError: the engine is running already.
            Exception: whatever a step, a handler or the data raised.
        """
        if self._is_running:
            raise EngineError("this engine is running; a handler that wants to run something needs another Engine")
        state, suspended = self.state, self._drive is not None
        if suspended and state.max_epochs is None and state.max_iters is None:
            self._drop_run()
            suspended = False
        if not suspended:
            self._settle_counters()
        terms = settle_terms(
            state,
            None if suspended else data,
            max_epochs,
            max_iters,
            epoch_length,
            epochs_completed=state.epoch - self.progress.epoch_is_open,
            resuming=suspended or self._was_loaded,
        )
        if not suspended:
            self._begin(terms, data)
        elif data is not None and data is not state.dataloader:
            self.logger.warning("the run goes on with the data it was suspended with; to change it, use set_data()")
        state.epoch_length, state.max_epochs, state.max_iters = terms.epoch_length, terms.max_epochs, terms.max_iters
        if not suspended and is_done(state.iteration, state.epoch, state.max_epochs, state.max_iters):
            self._drop_run()
            self.logger.warning(
                "nothing to run: all that was asked is done, %d epochs and %d iterations", state.epoch, state.iteration
            )
            return state
        self._was_loaded = False
        return self._go_on()

    def terminate(self, skip_completed: bool = False) -> None:
        """Ask for the run's end, after the event in whose handler this is called, or after the step.

        TERMINATE is fired, then COMPLETED unless `skip_completed`; not EPOCH_COMPLETED of an epoch in its middle. A
        next `run` goes on with the epoch after it.
        """
        if self.coordinator.ask(Request.TERMINATE):
            self.skips_completed = skip_completed is True  # not an engine: `terminate` itself may be a handler
            self.progress.abandoned = self.progress.epoch_is_open and self._loop is not None
            self._take_request(Request.TERMINATE)

    def terminate_epoch(self, skip_epoch_completed: bool = False) -> None:
        """Ask for the epoch's end, after the event in whose handler this is called, or after the step.

        TERMINATE_SINGLE_EPOCH is fired, then EPOCH_COMPLETED unless `skip_epoch_completed`; the next epoch begins a new
        pass over the data.
        """
        if self.coordinator.ask(Request.TERMINATE_EPOCH):
            self.skips_epoch_completed = skip_epoch_completed is True
            self._take_request(Request.TERMINATE_EPOCH)

    def interrupt(self) -> None:
        """Ask for the run to be suspended, after the event in whose handler this is called, or after the step.

        INTERRUPT is fired and `run` returns; the next call of `run` goes on at the very place.
        """
        if self.coordinator.ask(Request.INTERRUPT):
            self._take_request(Request.INTERRUPT)

    def set_data(self, data: Any) -> None:
        """Take batches from `data` from the next one on; the epoch's length stays.

        With `accumulate`, a group that was begun is finished first.
        """
        self.state.dataloader = data
        if self._loop is not None:
            self._loop.replace_data(data)

    @property
    def state_dict_user_keys(self) -> list[str]:
        """Names of state attributes to save and load besides the engine's own; append yours."""
        return self._user_keys

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, in plain numbers; collective-free.

        `iteration` counts the steps that were completed, `epoch_began_at` of them before the present epoch, of which
        `epochs_completed` came before it; `epoch_length` and `max_epochs` or `max_iters` are the run's terms.
        """
        state, progress = self.state, self.progress
        terms = {"max_epochs": state.max_epochs} if state.max_iters is None else {"max_iters": state.max_iters}
        return {
            "iteration": state.iteration - progress.step_is_open,
            "epochs_completed": state.epoch - progress.epoch_is_open,
            "epoch_began_at": progress.epoch_began_at,
            "epoch_length": state.epoch_length,
            **terms,
            **{key: getattr(state, key) for key in self._user_keys},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over where another run stood; the next `run` goes on from there.

        Args:
            state_dict: what `state_dict` gave, or a dict with `iteration` or `epoch` (completed ones),
                `max_epochs` or `max_iters`, `epoch_length`, and the user keys.

        Raises:
            ValueError: a key is missing, or two exclude each other; nothing was changed.
            EngineError: the engine is running.
        """
        if self._is_running:
            raise EngineError("this engine is running; load a state before run(), or after it")
        place = place_from(state_dict, self._user_keys)
        self._drop_run()
        state = self.state
        state.iteration, state.epoch = place.iteration, place.epochs_completed
        state.epoch_length, state.max_epochs, state.max_iters = place.epoch_length, place.max_epochs, place.max_iters
        state.dataloader = None
        for key in self._user_keys:
            setattr(state, key, state_dict[key])
        self.progress = Progress(epoch_began_at=place.epoch_began_at)
        self.registry.schedule(state)
        self._was_loaded = True

    def _settle_counters(self) -> None:
        """Bring the counters back to what was completed, after a run that ended in the middle of an epoch."""
        state, progress = self.state, self.progress
        state.iteration -= progress.step_is_open
        if progress.abandoned:
            progress.epoch_began_at = state.iteration
        else:
            state.epoch -= progress.epoch_is_open
        progress.step_is_open = progress.epoch_is_open = progress.abandoned = False

    def _begin(self, terms: Terms, data: Any) -> None:
        state = self.state
        if data is None and not terms.fresh:
            data = state.dataloader
        is_spent = hasattr(data, "__next__") and data is state.dataloader
        state.dataloader = data
        if terms.fresh:
            state.iteration = state.epoch = 0
            self.progress = Progress()
        state.weight, state.group_end = 1.0, True
        world = World.current()
        state.seed = None if world is None else world.seed
        self.asked.clear()
        self.skips_completed = self.skips_epoch_completed = False
        self.registry.schedule(state)
        self._loop = Loop(self, continues=not terms.fresh and not is_spent)
        self._drive = self._loop.drive()

    def _go_on(self) -> State:
        assert self._drive is not None
        self._is_running = True
        try:
            next(self._drive)
        except StopIteration:
            self._drop_run()
        except BaseException:
            self._drop_run()
            raise
        finally:
            self._is_running = False
        return self.state

    def _drop_run(self) -> None:
        if self._drive is not None:
            self._drive.close()
        self._drive = self._loop = None

    def _take_request(self, request: Request) -> None:
        self.asked.add(request)
        if self._loop is not None:
            self._loop.until = LOOK_NOW


def _check_step(step: Callable[..., Any]) -> None:
    if not callable(step):
        raise TypeError(f"process_function is {step!r}; it must be a function (engine, batch)")
    try:
        signature = inspect.signature(step)
    except (TypeError, ValueError):  # some builtins tell no signature
        return
    try:
        signature.bind(None, None)
    except TypeError:
        name = getattr(step, "__name__", step)
        raise ValueError(f"process_function is called with (engine, batch), but {name!r} takes {signature}") from None
