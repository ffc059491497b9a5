"""`Engine`: runs a step over data, epoch after epoch, and fires events on the way.

Contract: a user makes an engine from a step, adds handlers and calls `run`. The engine is a face. What it knows of its
run is in one `Run`, its handlers are in one `Registry`, and the work is done by those who are handed these: `run_plan`
decides whether a call of `run` begins anew, `handshake` agrees with the other ranks, `passes` gives batches, `loop`
runs, `control` takes requests, `resume` saves. What crosses ranks goes through the engine's `Coordinator`; the engine
calls no collective. What can go wrong: bad arguments raise before anything has changed; an exception of the user's code
leaves `run` and the engine can run again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any, Literal, TypeVar

from torch import nn

from allstep.coordination import OUTCOMES, Alone, Coordinator, Outcome, RequestKind, Uneven
from allstep.engine import control, resume
from allstep.engine.cancellation import cancellable
from allstep.engine.dummy_step import prepared_step
from allstep.engine.events import AnyEvent, EventEnum
from allstep.engine.extension import Extension
from allstep.engine.handshake import shake_hands
from allstep.engine.loop import RunLoop
from allstep.engine.monitoring import RunMonitor, fault_injection, is_nested, monitored, nesting, with_faults
from allstep.engine.passes import Passes
from allstep.engine.registry import EventKey, Registry, RemovableEventHandle
from allstep.engine.replica_audit import INTERVAL
from allstep.engine.replicas import modules_in_step
from allstep.engine.run import Run
from allstep.engine.run_plan import (
    RunArguments,
    RunTerms,
    SamplesIn,
    StepSettings,
    asks_for_more,
    check_choice,
    check_step,
    checked_length,
    settle_terms,
)
from allstep.engine.skipping import skip_of
from allstep.engine.source import END
from allstep.engine.state import State
from allstep.errors import ArgumentTypeError, EngineError
from allstep.parallel import Precision
from allstep.world import World, internals

H = TypeVar("H", bound=Callable[..., Any])


class Engine:
    """Runs `process_function(engine, batch)` over data and fires `Events`.

    A subclass that overrides `_fire_event` is given every event, whether anybody listens or not; it calls
    `super()._fire_event` for the handlers to run.

    Args:
        process_function: the step; what it returns, of any type, becomes `state.output`.
        coordinator: how ranks agree; by default the current world's. `Alone()` for an engine that runs on some ranks
            only.
        accumulate: iterations whose gradients make one optimizer step. `state.weight` and `state.group_end` are set
            accordingly, and DDP reduces gradients in the last of them only.
        samples_in: `batch -> int`, what `state.weight` and metrics weigh by; by default what the batch itself shows.
        uneven: the default of `run`'s argument.
        idle: what a rank does in an iteration for which it has no batch while others have: run the step on a "filler",
            at weight zero, so that collectives match, or "skip" it, where no model is in parts; both fire events.
        resumes: whether `run` goes on in a run that an exception or `terminate` left. By default it does, but for a run
            of one epoch, or of `max_iters`, inside another engine's: an evaluation is done whole or anew.
        precision: of the forward passes in the step of wrapped modules and of `modules`: "no", "fp16" or "bf16", in
            autocast. They give on float32. With "fp16" the step is to scale its loss.
        audit: iterations between comparisons of DDP's copies of a model, by hashes in votes that are held anyway; a
            warning names ranks that differ. None compares at epochs' ends alone.
        name: what this engine is called when ranks compare what they run; by default the step's name.

    Attributes:
        process_function: the step.
        state: the run's `State`.
        modules: wrapped modules that the step trains, besides those from the current world's `wrap`.
        logger: where the engine reports.
        extension: what metrics, checkpoints and other libraries may ask of the engine besides.
        state_dict_user_keys: names of state attributes to save and load besides the engine's own; append yours.
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
        resumes: bool | None = None,
        precision: Precision = "no",
        audit: int | None = INTERVAL,
        name: str | None = None,
    ) -> None:
        check_step(process_function)
        name = name or str(getattr(process_function, "__qualname__", type(process_function).__qualname__))
        self._run = Run(StepSettings(name, accumulate, samples_in, uneven, idle, resumes, precision, audit))
        self._overrides_firing = type(self)._fire_event is not Engine._fire_event
        self._registry = Registry(self._run.state, pinned=self._overrides_firing)
        self._passes: Passes | None = None
        self._given_coordinator = coordinator
        self.process_function = process_function
        self.state = self._run.state
        self._run.state.skip_with(skip_of(self._run))
        self.modules: list[nn.Module] = []
        self.logger: logging.Logger = self._run.logger
        self.extension = Extension(self._run, self._registry)
        self.state_dict_user_keys: list[str] = []

    @property
    def name(self) -> str:
        """What this engine is called when ranks compare what they run."""
        return self._run.settings.name

    @property
    def accumulate(self) -> int:
        """Global batches whose gradients make one optimizer step."""
        return self._run.settings.accumulate

    @property
    def coordinator(self) -> Coordinator:
        """How this engine's ranks agree."""
        if self._given_coordinator is not None:
            return self._given_coordinator
        world = World.current()
        return Alone() if world is None else internals(world).coordinator

    # Handlers

    def on(self, event: AnyEvent | str, *args: Any, **kwargs: Any) -> Callable[[H], H]:
        """Decorator that adds the function as a handler; see `add_event_handler`."""

        def add(handler: H) -> H:
            self.add_event_handler(event, handler, *args, **kwargs)
            return handler

        return add

    def add_event_handler(
        self, event: AnyEvent | str, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Have `handler` called whenever the event is fired and its filter lets it through.

        Handlers are called in the order they were added, as `handler(engine, *args, **kwargs)`, or without the engine
        if the handler's signature has no place for it. Handlers of EXCEPTION_RAISED are given the exception after the
        engine, those of TERMINATE_SINGLE_EPOCH may take the number of iterations done in the epoch.

        Args:
            event: an event, one with a filter, or several joined with `|`.
            handler: any callable.
            args: further positional arguments of each call.
            kwargs: keyword arguments of each call.

        Returns:
            A handle to remove the handler with, also as a context manager.

        Raises:
            ArgumentError: the event is not registered, or the handler cannot take the call.
        """
        self._registry.add(event, handler, *args, **kwargs)
        return RemovableEventHandle(event, handler, self._registry)

    def has_event_handler(self, handler: Callable[..., Any], event: AnyEvent | str | None = None) -> bool:
        """Whether `handler` listens to `event`, or, without one, to any."""
        return self._registry.has(handler, event)

    def remove_event_handler(self, handler: Callable[..., Any], event: AnyEvent | str) -> None:
        """Take `handler` off `event`. Raises ArgumentError when it is not there."""
        self._registry.remove(handler, event)

    def register_events(self, *events: EventEnum | str, event_to_attr: Mapping[Any, str] | None = None) -> None:
        """Make events of your own known to this engine, so that they can have handlers and be fired.

        Args:
            events: members of an `EventEnum`, or strings.
            event_to_attr: for filters, the attribute of the state that counts each event; made, at 0, if absent.

        Raises:
            ArgumentTypeError: something given is no event, or event_to_attr no mapping.
        """
        counters = {} if event_to_attr is None else event_to_attr
        if not isinstance(counters, Mapping):
            raise ArgumentTypeError(f"event_to_attr is {counters!r}; it must map events to names of state attributes")
        for event in events:
            if not isinstance(event, EventEnum | str):
                raise ArgumentTypeError(f"{event!r} is not an event; give members of an EventEnum, or strings")
        self._registry.register(events, counters)

    def has_registered_events(self, event: Any) -> bool:
        """Whether this engine knows the event."""
        return event in self._registry.slots

    def fire_event(self, event: EventEnum | str) -> None:
        """Fire an event of your own from a step or a handler. Raises ArgumentError when it is not registered."""
        self._fire_event(self._registry.slot(event).event)

    def _fire_event(self, event: Any, *event_args: Any) -> None:
        """Call the handlers of an event that are due; a subclass may override it to be given every event."""
        self._registry.fire(self, event, *event_args)

    @property
    def last_event_name(self) -> EventKey | None:
        """The event that was fired last; None before the first."""
        return self._registry.last_event

    # Changing the course of a run

    def terminate(
        self,
        skip_completed: bool = False,
        *,
        reason: str | None = None,
        agreed: bool = False,
        outcome: Outcome = "left",
    ) -> None:
        """Ask for the run's end.

        Alone it holds after the event in whose handler this is called, or after the step. With several ranks any of
        them may ask: all end at the same iteration, on a group's boundary, by the end of the next window, and at once
        when it is asked for in a handler of EPOCH_COMPLETED. TERMINATE is fired, then COMPLETED unless
        `skip_completed`; not EPOCH_COMPLETED of an epoch in its middle. A next `run` goes on there, inside the epoch.

        Args:
            skip_completed: leave out COMPLETED.
            reason: what `state.stop_reason` says, after the rank.
            agreed: all ranks call this at the same iteration, so it holds at once; they check that it is so.
            outcome: "left" where the run is to go on another time; "cancelled" as by Ctrl-C, which ends the process
                too; "preempted" where the scheduler wants the devices, so that a `Preemption` that is attached ends the
                process with exit code 85, unless the run is complete; "finished" where it has reached its goal, so that
                a run which goes on from the saved state trains nothing; "failed" where its state is of no use, so that
                a `Checkpoint` does not save it. Where several are asked for, the last of these holds.

        Raises:
            ArgumentError: outcome is none of these.
        """
        check_choice("outcome", outcome, OUTCOMES)
        # It may be a handler, given an engine as its first argument.
        skip = skip_completed is True
        control.ask(self._run, RequestKind.TERMINATE, reason, skip=skip, agreed=agreed, outcome=outcome)

    def terminate_epoch(self, skip_epoch_completed: bool = False, *, reason: str | None = None) -> None:
        """Ask for the epoch's end, which holds as that of `terminate` does.

        TERMINATE_SINGLE_EPOCH is fired, then EPOCH_COMPLETED unless `skip_epoch_completed`; the next epoch begins a new
        pass over the data.
        """
        control.ask(self._run, RequestKind.TERMINATE_EPOCH, reason, skip=skip_epoch_completed is True)

    def interrupt(self, *, reason: str | None = None) -> None:
        """Ask for the run to be suspended, which holds as the end by `terminate` does.

        INTERRUPT is fired and `run` returns; the next call of `run` goes on at the very place.
        """
        control.ask(self._run, RequestKind.INTERRUPT, reason)

    def set_data(self, data: Any) -> None:
        """Take batches from `data`; the present epoch's length stays.

        Alone, and between passes, from the next batch on; with several ranks, inside a pass, when it has been voted on,
        as an end by `terminate` is. Ranks may replace their data one by one.
        """
        control.propose_data(self._run, data)

    @property
    def should_terminate(self) -> bool:
        """Whether the run is to end."""
        return RequestKind.TERMINATE in self._run.holding

    @property
    def should_terminate_single_epoch(self) -> bool:
        """Whether the epoch is to end."""
        return RequestKind.TERMINATE_EPOCH in self._run.holding

    @property
    def should_interrupt(self) -> bool:
        """Whether the run is to be suspended."""
        return RequestKind.INTERRUPT in self._run.holding

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands; collective-free.

        `iteration` counts the steps that were completed, up to the end of the last whole accumulation group, and
        `epoch_began_at` those of them before the present epoch, of which `epochs_completed` came before it;
        `epoch_length` and `max_epochs` or `max_iters` are the run's terms. All are plain numbers. `epoch_is_pass` is
        there when the epoch's length is the data's; `data` when the data can tell its place: its `position`, the same
        on all ranks, or its `own` state, each rank's; `finished` when the run was ended as finished: why.
        """
        return resume.save(self._run, self._passes, self.state_dict_user_keys)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over where another run stood; the next `run` goes on from there.

        Args:
            state_dict: what `state_dict` gave, or a dict with `iteration` or `epoch` (completed ones),
                `max_epochs` or `max_iters`, `epoch_length`, and the user keys.

        Raises:
            ArgumentError: a key is missing, or two exclude each other; nothing was changed.
            EngineError: the engine is running.
        """
        if self._run.is_running:
            raise EngineError("this engine is running; load a state before run(), or after it")
        resume.position_from(state_dict, self.state_dict_user_keys)  # raises before anything is dropped
        self._leave()
        resume.load(self._run, state_dict, self.state_dict_user_keys)
        self._registry.schedule()

    # Running

    @property
    def is_running(self) -> bool:
        """Whether `run` is under way."""
        return self._run.is_running

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
        interrupted, terminated, failed or loaded a state goes on, unless it evaluates (`resumes`). A loaded state that
        is finished already returns at once, as does one that was ended as finished, unless it is asked for more epochs
        or iterations than then.

        Args:
            data: an iterable of batches, or None, with an `epoch_length`, for batches of None. Data shorter than the
                epoch is iterated again within it, longer data goes on in the next epoch.
            max_epochs: epochs to run, 1 by default.
            max_iters: iterations to run, instead of `max_epochs`.
            epoch_length: iterations in an epoch; by default an epoch is one pass over the data as it is then. With
                several ranks it is the same on all: the least of their lengths, under "longest" the greatest.
            uneven: what ends a pass over the data when ranks have different numbers of batches: the first rank without
                one ("shortest"), the last one, the others taking part at weight zero ("longest"), or an error on all
                ranks ("error"). By default the engine's.
            window: the most accumulation groups that ranks agree on at a time; by default up to 32. With 1 a stop that
                one rank asks for holds after the present group.
            lookahead: batches that are read ahead, where counting them needs reading. By default 4 or one group at
                first, and up to 32 while those that a rank holds take less than 64 MB.

        Returns:
            The engine's state.

        Raises:
            ArgumentError: an argument is out of range or contradicts the state.
            ArgumentTypeError: data is not iterable.
            DataError: the data is empty, or shorter than what a continued run has consumed.
            EngineError: the engine is running already.
            AgreementError: ranks are about to run different things, or came apart; the same on all of them.
            Exception: whatever a step, a handler or the data raised.
            Cancelled: after Ctrl-C; see `allstep.engine.cancellation`.
        """
        if self._run.is_running:
            raise EngineError("this engine is running; a handler that wants to run something needs another Engine")
        policy = uneven or self._run.settings.uneven
        arguments = RunArguments(max_epochs, max_iters, epoch_length, policy, window, lookahead)
        with monitored(self.name, self.state) as monitor:
            if self._prepare(data, arguments, monitor):
                self._go_on()
        return self.state

    def _prepare(self, data: Any, arguments: RunArguments, monitor: RunMonitor | None) -> bool:
        """Decide what a call of `run` is to do and make ready for it. False when there is nothing to run."""
        run, state = self._run, self.state
        if run.is_under_way and state.max_epochs is None and state.max_iters is None:
            self._leave()  # the user set both to None, which means to begin anew
        is_suspended = run.is_under_way
        length, opens_at = None, None
        if not is_suspended:
            run.coordinator, run.logger = self.coordinator, self.logger
            run.modules, run.replicas = modules_in_step(self.modules, run.coordinator, run.settings.audit)
            resume.settle_counters(run, nested=is_nested())
            source = state.dataloader if data is None else data
            opens_at, arguments = resume.go_to_position(run, source, arguments)
            run.handshake = shake_hands(run, source, arguments, reductions=self.extension.reductions)
            if run.replicas is not None:
                run.replicas.unify_buffers()
            length = checked_length(source) if run.handshake is None else run.handshake.length
        terms = settle_terms(
            state,
            None if is_suspended else data,
            arguments.max_epochs,
            arguments.max_iters,
            arguments.epoch_length,
            length=length,
            epochs_completed=run.epochs_completed,
            resuming=is_suspended or run.was_loaded or run.unfinished is not None,
            epoch_was_pass=run.epoch_is_pass,
        )
        is_finished = run.was_loaded and state.outcome == "finished" and not asks_for_more(terms, state)
        finished = state.stop_reason if is_finished else None
        if not is_suspended:
            self._begin(terms, data, opens_at, monitor)
        elif data is not None and data is not state.dataloader:
            self.logger.warning("the run goes on with the data it was suspended with; to change it, use set_data()")
        run.take_terms(terms)
        if finished is not None:
            # Beginning has forgotten why the run was finished; a save of this state is to say so again.
            self._leave()
            state.stop_reason, state.outcome = finished, "finished"
            self.logger.info("nothing to run: the run was finished: %s", finished)
            return False
        if self.extension.is_complete and run.unfinished is None and not is_suspended:
            self._leave()
            self.logger.info(
                "nothing to run: all that was asked is done, %d epochs and %d iterations", state.epoch, state.iteration
            )
            return False
        run.was_loaded = False
        return True

    def _begin(self, terms: RunTerms, data: Any, opens_at: int | None, monitor: RunMonitor | None) -> None:
        """Set the record to the beginning of a run, or to where one goes on, and make the loop that runs it."""
        run, state = self._run, self.state
        if data is None and not terms.fresh:
            data = state.dataloader
        is_spent = run.has_read(data)
        state.dataloader = data
        if terms.fresh:
            run.forget_progress()
        if run.unfinished is None:
            self._registry.forget_unfinished()
        run.kept = run.kept if is_spent else []
        state.weight, state.group_end, state.active, state.samples = 1.0, True, True, None
        state.unread, state.stop_reason, state.outcome = (), None, None
        run.forget_requests()
        world = World.current()
        state.seed, run.end_step = (None, None) if world is None else (world.seed, internals(world).end_step)
        self._registry.schedule()
        run.data_state = END

        # The loop calls both without naming the engine: a step and a handler are given it as their first argument.
        step = with_faults(run, prepared_step(run, MethodType(self.process_function, self)))
        fire: Callable[..., None] = self._fire_event if self._overrides_firing else partial(self._registry.fire, self)
        finish: Callable[..., None] = partial(self._registry.finish, self)
        if monitor is not None:
            step, fire, finish = monitor.step(step), monitor.fire(fire), monitor.fire(finish)
        iterate = iter if monitor is None else monitor.iterate
        continues = not terms.fresh and not is_spent
        self._passes = Passes(run, continues=continues, opens_at=opens_at, iterate=iterate)
        slots = self._registry.slots
        run.drive = RunLoop(
            run, self._passes, step=step, fire=fire, finish=finish, slots=slots, monitor=monitor
        ).drive()

    def _go_on(self) -> None:
        """Drive the loop until it ends or is suspended."""
        run, ends = self._run, True
        assert run.drive is not None
        run.is_running = True
        try:
            with cancellable(run), fault_injection(run, self._registry), nesting():
                ends = next(run.drive, END) is END
        # Also after an exception: the state tells how far the run came, and the engine can run again.
        finally:
            run.is_running = False
            if ends:
                self._leave()
        if ends and run.leaving is not None:
            leaving, run.leaving = run.leaving, None
            raise leaving

    def _leave(self) -> None:
        resume.leave(self._run, self._passes)
        self._passes = None
        self._run.modules, self._run.replicas = [], None  # not kept alive between runs
