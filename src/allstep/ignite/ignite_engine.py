"""`IgniteEngine`: an engine that is Ignite's to Ignite's handlers, and runs allstep's loop.

Contract: it is an instance of both `Engine` classes. Handlers are Ignite's business: its methods add, find, remove and
call them, and events of allstep are translated on their way in. The loop, the agreement of ranks and saving are
allstep's. `run` has Ignite decide, with its own checks and messages, whether a run begins anew or goes on and on which
terms; then allstep's loop runs it. An exception is swallowed where a handler of EXCEPTION_RAISED lets it pass, as in
Ignite, but not where several ranks agree: the others would wait for ever.

What differs from Ignite on purpose is listed in docs/howto/ignite.md.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from ignite.engine import Engine as OriginalEngine
from ignite.engine import Events as IgniteEvents

from allstep.coordination import Outcome, RequestKind
from allstep.engine import Engine, EventEnum, Events
from allstep.errors import EngineError
from allstep.ignite.ignite_private import IgniteDistributed, IgniteNames
from allstep.ignite.ignite_state import IgniteState, state_from
from allstep.ignite.translation import OPTIMIZER_STEP_COMPLETED, to_ignite
from allstep.world import World

_BEFORE_BATCHES = (Events.STARTED, Events.EPOCH_STARTED)


_DISTRIBUTED = IgniteDistributed()


class IgniteEngine(IgniteNames, Engine):
    """Runs `process_function(engine, batch)` over data and fires events; Ignite's engine with allstep's loop.

    Args:
        process_function: the step; what it returns, of any type, becomes `state.output`.
        options: keyword arguments of `allstep.Engine`, such as `accumulate`, `uneven` and `coordinator`.

    Attributes:
        logger: as in Ignite, "ignite.engine.engine.Engine", until another one is set.

    Raises:
        ValueError: process_function is no function of (engine, batch).
    """

    def __init__(self, process_function: Callable[[Any, Any], Any], **options: Any) -> None:
        OriginalEngine(process_function)  # its checks, before anything is made
        self._ends: dict[RequestKind, bool | str] = {}
        self._left = 0, 0  # iteration and epoch, as the loop knows them
        self._settled: Any = None
        self._data: Any = None
        Engine.__init__(self, process_function, **options)
        self.begin_as_ignite(process_function)
        self.state = IgniteState()
        self.register_events(Events.OPTIMIZER_STEP_COMPLETED)
        self.extension.keep_handlers_elsewhere(_Handlers(self))
        self.extension.keep_epoch_length()
        # Weak, so that an engine that nobody holds any more is freed at once.
        self.extension.survive(partial(IgniteEngine._survives, weakref.proxy(self)))

    @property
    def state(self) -> Any:
        """The run's state; another one may be set between runs."""
        return self.extension.state

    @state.setter
    def state(self, state: Any) -> None:
        # allstep's constructor sets its own, before there is a door to set another.
        if "extension" in vars(self) and state is not self.extension.state:
            self.extension.replace_state(state_from(state))

    @property
    def is_under_way(self) -> bool:
        """Whether a run has begun and not ended; it may be suspended."""
        return "extension" in vars(self) and self.extension.is_under_way

    # Handlers: Ignite's methods, for events of both kinds

    def add_event_handler(self, event_name: Any, handler: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Have `handler` called whenever the event is fired; as in Ignite, for events of allstep too."""
        handle = OriginalEngine.add_event_handler(self, to_ignite(event_name), handler, *args, **kwargs)
        if handle.handler() is None:  # a bound method, for which Ignite's own handle would remove nothing
            handle.handler = weakref.WeakMethod(handler)
        return handle

    def has_event_handler(self, handler: Callable[..., Any], event_name: Any = None) -> bool:
        """Whether `handler` listens to the event, or, without one, to any."""
        return bool(OriginalEngine.has_event_handler(self, handler, to_ignite(event_name)))

    def remove_event_handler(self, handler: Callable[..., Any], event_name: Any) -> None:
        """Take `handler` off the event. Raises ValueError when it is not there."""
        OriginalEngine.remove_event_handler(self, handler, to_ignite(event_name))

    def register_events(self, *event_names: Any, event_to_attr: Any = None) -> None:
        """Make events of your own known, so that they can have handlers and be fired; as in Ignite."""
        if isinstance(event_to_attr, Mapping):
            event_to_attr = {to_ignite(event): name for event, name in event_to_attr.items()}
        # Ignite's are members or strings. One of allstep's that it has no member for is known by its name.
        known = [event.name if isinstance(event, EventEnum) else event for event in event_names]
        OriginalEngine.register_events(self, *known, event_to_attr=event_to_attr)

    def has_registered_events(self, event: Any) -> bool:
        """Whether this engine knows the event."""
        return bool(OriginalEngine.has_registered_events(self, to_ignite(event)))

    def fire_event(self, event_name: Any) -> None:
        """Fire an event of your own from a step or a handler. Raises ValueError when it is not registered."""
        OriginalEngine.fire_event(self, to_ignite(event_name))

    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        """Call the handlers of an event; the loop calls it with allstep's events, a script may with Ignite's."""
        if not isinstance(event_name, Events):
            self.call_handlers(event_name, *event_args, **event_kwargs)
            return
        self.extension.note_event(event_name)
        if event_name is Events.ITERATION_COMPLETED and self.state.group_end:
            self.call_handlers(OPTIMIZER_STEP_COMPLETED)
        elif event_name is Events.STARTED:
            self._data = self.state.dataloader
        elif event_name is Events.EPOCH_STARTED:
            self._ends.pop(RequestKind.TERMINATE_EPOCH, None)
        elif event_name is Events.TERMINATE_SINGLE_EPOCH:
            event_kwargs = {"iter_counter": event_args[0]}  # Ignite gives it by name
            event_args = ()
        if event_name is Events.ITERATION_COMPLETED and not self.state.active:
            runs_fillers = self.extension.settings.idle == "filler"
            self.call_without_batch(IgniteEvents.ITERATION_COMPLETED, has_output=runs_fillers)
        else:
            self.call_handlers(to_ignite(event_name), *event_args, **event_kwargs)
        if event_name is Events.DATALOADER_STOP_ITERATION:
            self._take_up_data()
        elif event_name is Events.EPOCH_COMPLETED:
            self._ends.pop(RequestKind.TERMINATE_EPOCH, None)
            taken = _clock(self.state.times[event_name.name])
            self.logger.info("Epoch[%d] Complete. Time taken: %s", self.state.epoch, taken)
        elif event_name in _BEFORE_BATCHES and RequestKind.TERMINATE_EPOCH in self._ends:
            raise EngineError(
                "terminate_epoch() was called in a handler of STARTED or EPOCH_STARTED, where Ignite has no epoch to "
                "end; call it from GET_BATCH_STARTED on"
            )

    def _take_up_data(self) -> None:
        """Go over to data that a handler put into the state, as Ignite does when its iterator has ended."""
        if self.state.dataloader is not self._data:
            self.set_data(self.state.dataloader)

    def _survives(self, error: BaseException) -> bool:
        """Whether Ignite would swallow an exception that handlers were told of: where there is any handler."""
        return self.swallows_exceptions()

    # Changing the course of a run

    def terminate(
        self,
        skip_completed: bool = False,
        *,
        reason: str | None = None,
        agreed: bool = False,
        outcome: Outcome = "left",
    ) -> None:
        """Ask for the run's end, as `allstep.Engine.terminate` does: all ranks end at the same iteration."""
        self.logger.info("Terminate signaled. Engine will stop after current iteration is finished.")
        Engine.terminate(self, skip_completed, reason=reason, agreed=agreed, outcome=outcome)
        self._ends[RequestKind.TERMINATE] = "skip_completed" if skip_completed is True else True

    def terminate_epoch(self, skip_epoch_completed: bool = False, *, reason: str | None = None) -> None:
        """Ask for the epoch's end, as `allstep.Engine.terminate_epoch` does."""
        self.logger.info("Terminate current epoch is signaled. It will stop after current iteration is finished.")
        Engine.terminate_epoch(self, skip_epoch_completed, reason=reason)
        skips = skip_epoch_completed is True
        self._ends[RequestKind.TERMINATE_EPOCH] = "skip_epoch_completed" if skips else True

    def interrupt(self, *, reason: str | None = None) -> None:
        """Ask for the run to be suspended; the next `run` goes on at the very place.

        Raises:
            RuntimeError: `interrupt_resume_enabled` is off.
        """
        if not self.interrupt_resume_enabled:
            raise EngineError(
                "Engine 'interrupt/resume' feature is disabled. Set Engine.interrupt_resume_enabled=True to enable it"
            )
        self.logger.info("interrupt signaled. Engine will interrupt the run after current iteration is finished.")
        Engine.interrupt(self, reason=reason)

    def set_data(self, data: Any) -> None:
        """Take batches from `data` from the next one on; the length of this and of later epochs stays."""
        self._data = data
        Engine.set_data(self, data)

    @property
    def should_terminate(self) -> bool | str:
        """Whether the run is to end, or has been ended: False, True, or "skip_completed"."""
        return self._asked(RequestKind.TERMINATE)

    @should_terminate.setter
    def should_terminate(self, value: bool | str) -> None:
        self._ask(RequestKind.TERMINATE, value, self.terminate)

    @property
    def should_terminate_single_epoch(self) -> bool | str:
        """Whether the epoch is to end: False, True, or "skip_epoch_completed"."""
        return self._asked(RequestKind.TERMINATE_EPOCH)

    @should_terminate_single_epoch.setter
    def should_terminate_single_epoch(self, value: bool | str) -> None:
        self._ask(RequestKind.TERMINATE_EPOCH, value, self.terminate_epoch)

    @property
    def should_interrupt(self) -> bool:
        """Whether the run is to be suspended."""
        return bool(self._asked(RequestKind.INTERRUPT))

    @should_interrupt.setter
    def should_interrupt(self, value: bool) -> None:
        self._ask(RequestKind.INTERRUPT, value, lambda skip: self.interrupt())

    def _asked(self, kind: RequestKind) -> bool | str:
        # What another rank asked for is known here when it holds.
        return self._ends.get(kind, kind in self.extension.holding)

    def _ask(self, kind: RequestKind, value: bool | str, ask: Callable[[bool], None]) -> None:
        """What setting one of Ignite's flags means; its constructor sets them off, before there is anything to ask."""
        if value:
            ask(isinstance(value, str))
        else:
            self._ends.pop(kind, None)

    # Saving

    def state_dict(self) -> OrderedDict[str, Any]:
        """Where the run stands: Ignite's keys, and those of allstep that cannot be told from them."""
        state = Engine.state_dict(self)
        iteration, length = state["iteration"], state["epoch_length"]
        done, began_at = state["epochs_completed"], state["epoch_began_at"]
        if not iteration or (length and (done, began_at) == (iteration // length, done * length)):
            del state["epochs_completed"], state["epoch_began_at"]
        if "data" not in state and _length(self.state.dataloader) == length:
            state.pop("epoch_is_pass", None)
        return OrderedDict(state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over where another run stood, of this class, of Ignite's or of allstep's.

        Raises:
            TypeError: state_dict is no mapping.
            ValueError: a key is missing or contradicts another; nothing was changed.
            EngineError: the engine is running.
        """
        # Ignite's own engine judges whether it is a state, in its words.
        judge = OriginalEngine(lambda engine, batch: None)
        judge.state_dict_user_keys.extend(self.state_dict_user_keys)
        judge.load_state_dict(state_dict)
        Engine.load_state_dict(self, state_dict)
        self._left = self.state.iteration, self.state.epoch

    # Running

    def run(
        self,
        data: Any = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
        **options: Any,
    ) -> Any:
        """Run the step over `data`, as Ignite's `run` does: begin anew or go on by its rules.

        Args:
            data: an iterable of batches, or None with an `epoch_length`.
            max_epochs: epochs to run, 1 by default.
            max_iters: iterations to run, instead of `max_epochs`.
            epoch_length: iterations in an epoch; by default the data's length.
            options: `uneven`, `window` and `lookahead` of `allstep.Engine.run`.

        Returns:
            The engine's state.

        Raises:
            ValueError: an argument is out of range or contradicts the state.
            TypeError: data is not iterable.
            EngineError: the engine is running already.
            Exception: what `allstep.Engine.run` raises.
        """
        if self.is_running:
            raise EngineError("this engine is running; a handler that wants to run something needs another Engine")
        self.begins_anew = False
        self._settled = data, epoch_length, self.state.dataloader, self.state.epoch_length, options
        return OriginalEngine.run(self, data, max_epochs, max_iters, epoch_length)

    def prepare_data(self, data: Any) -> Any:
        """What a run that begins or goes on takes batches from, in place of what it was given."""
        return data

    def run_loop(self) -> Any:
        """Run allstep's loop on the terms that Ignite has just written into the state."""
        state = self.state
        data, epoch_length, before, length_before, options = self._settled
        terms = {"max_epochs": state.max_epochs, "max_iters": state.max_iters}
        state.dataloader = before  # by which the loop tells new data from what it had
        if self.begins_anew:
            # Without terms a run begins anew. An epoch's length that the data tells is the data's own affair.
            state.max_epochs = state.max_iters = None
            if epoch_length is None and _length(data) is None:
                epoch_length = state.epoch_length
            state.epoch_length = length_before
        elif not self.is_under_way and self._left != (state.iteration, state.epoch):
            self.extension.replace_state(state)  # the script has set counters
        elif self._ends.get(RequestKind.TERMINATE):
            self.extension.end_epoch()  # as Ignite documents it, a terminated epoch is over
        self._ends.clear()
        self.forget_place()
        self._settled = self._data = None
        world = World.current()
        if world is None:
            _warn_of_ranks_alone()
        elif self.coordinator.world_size > 1:
            _DISTRIBUTED.enter(world)
        if not self.is_under_way:
            data = self.prepare_data(data)
        try:
            Engine.run(self, data, **terms, epoch_length=epoch_length, **options)
        finally:
            self._left = state.iteration, state.epoch
        if not self.is_under_way:
            self.logger.info("Engine run finished. Time taken: %s", _clock(state.times[Events.COMPLETED.name]))
        return state


class _Handlers:
    """An engine's handlers, for what extends allstep's engines."""

    def __init__(self, engine: IgniteEngine) -> None:
        self._engine = weakref.proxy(engine)

    def handlers(self) -> list[Callable[..., Any]]:
        found: list[Callable[..., Any]] = self._engine.all_handlers()
        return found

    def surround(self, event: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._engine.surround_handlers(to_ignite(event), before, after)


def _warn_of_ranks_alone() -> None:
    """Say that ranks which Ignite or the script itself has connected do not agree on anything here."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"torch.distributed has {dist.get_world_size()} ranks and no World is open, so that each of them runs "
            "alone, and one that ends early leaves the others waiting; open a World around the training, inside of "
            "ignite.distributed.Parallel: with allstep.init(): ...",
            RuntimeWarning,
            stacklevel=5,
        )


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _clock(seconds: float | None) -> str:
    minutes, rest = divmod(seconds or 0.0, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours:02d}:{minutes:02d}:{rest:06.3f}"


IgniteEngine.__name__ = IgniteEngine.__qualname__ = "Engine"  # what Ignite's messages and loggers call it
IgniteEngine.__module__ = "allstep.ignite"
