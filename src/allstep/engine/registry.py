"""Which handlers listen to which events of one engine, ready to be called.

Contract: an engine owns one `Registry`. `add` checks the handler's signature against how it will be called and compiles
it to a call that takes the engine. `fire` is the one place through which every event goes. Each event has a
`HandlerSlot`. Its `due` is the smallest count of the event's counter at which anything has to be called, so that the
loop's one test `slot.due <= count` is all that an event costs when nobody listens or no listener is due. `schedule`
brings it up to date; it must be called when a counter was moved other than by counting up.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

from torch.optim.lr_scheduler import LRScheduler

from allstep.engine.events import COUNTERS, NEVER, AnyEvent, EventEnum, Events, EventsList, Filter, FilteredEvent
from allstep.engine.state import State
from allstep.errors import ArgumentError, ArgumentTypeError
from allstep.suggestions import nearest

EventKey: TypeAlias = EventEnum | str

ALWAYS = -1.0
_EVENT_ARGUMENTS: dict[EventKey, tuple[str, ...]] = {
    Events.EXCEPTION_RAISED: ("exception",),
    Events.TERMINATE_SINGLE_EPOCH: ("iter_counter",),
}


@dataclass(frozen=True, slots=True, eq=False)
class HandlerRegistration:
    """One handler on one event. `call` takes the engine and what the event carries, and gives on what it should."""

    handler: Callable[..., Any]
    filter: Filter | None
    call: Callable[..., Any]


class HandlerSlot:
    """The handlers of one event, and when the first of them is due."""

    __slots__ = ("attribute", "due", "event", "pinned", "registrations", "unfinished")

    def __init__(self, event: EventKey, attribute: str | None, pinned: bool) -> None:
        self.event = event
        self.attribute = attribute
        self.pinned = pinned
        self.registrations: list[HandlerRegistration] = []
        # When one has raised: that one and those behind it, which were not called.
        self.unfinished: list[HandlerRegistration] = []
        self.due: float = ALWAYS if pinned else NEVER

    def schedule(self, count: int) -> None:
        """Set `due` to the smallest count from `count` on at which a handler may be due."""
        # Without a filter a handler is due at every count.
        if self.pinned or any(registration.filter is None for registration in self.registrations):
            self.due = ALWAYS
        else:
            self.due = min((r.filter.next_due(count) for r in self.registrations if r.filter), default=NEVER)

    def call(self, engine: Any, count: int, event_args: tuple[Any, ...]) -> None:
        """Call the handlers that are due at `count`, in the order of registration.

        One that is added meanwhile is called too, one that is removed is called for the last time.
        """
        self._call(self.registrations, engine, count, event_args)

    def finish(self, engine: Any, count: int) -> None:
        """Call those that an exception of one of them has left, and that are still handlers of the event."""
        known = {id(each) for each in self.registrations}
        left, self.unfinished = self.unfinished, []
        self._call([each for each in left if id(each) in known], engine, count, ())

    def _call(
        self, registrations: list[HandlerRegistration], engine: Any, count: int, event_args: tuple[Any, ...]
    ) -> None:
        registration = None
        try:
            for registration in registrations:  # `remove` replaces the list, so that it does not change under the loop
                if registration.filter is None or registration.filter.matches(engine, count):
                    registration.call(engine, *event_args)
        except BaseException:
            at = next((at for at, each in enumerate(registrations) if each is registration), 0)
            self.unfinished = registrations[at:]
            raise
        if self.due != ALWAYS:
            self.schedule(count + 1)


class Registry:
    """The handlers of one engine.

    Args:
        state: whose counters say when handlers are due.
        pinned: every event is listened to, for an engine that overrides the firing.

    Attributes:
        slots: the handlers of each event that is known.
        last_event: the event that was fired last, None before the first.
    """

    def __init__(self, state: State, *, pinned: bool = False) -> None:
        self._state = state
        self._pinned = pinned
        self.slots: dict[EventKey, HandlerSlot] = {}
        self.last_event: EventKey | None = None
        self.register(Events, COUNTERS)
        # The first of ITERATION_COMPLETED while anybody listens: a loop without listeners asks for no group's end.
        # Weak, so that a registry does not hold itself: an engine that is let go frees its data at once.
        weak = weakref.proxy(self)
        tell = partial(Registry._tell_of_optimizer_step, weak)
        self._optimizer_step = HandlerRegistration(tell, OptimizerStepFilter(weak), tell)
        if pinned:
            self._listen_for_optimizer_steps()

    def follow(self, state: State) -> None:
        """Count by another state from now on."""
        self._state = state
        for slot in self.slots.values():
            if slot.attribute and not hasattr(state, slot.attribute):
                setattr(state, slot.attribute, 0)
        self.schedule()

    def register(self, events: Iterable[EventKey], counters: Mapping[Any, str]) -> None:
        """Make these events known, with the state's attribute that counts each; one that is absent is made, at 0."""
        for event in events:
            if event not in self.slots:
                self.slots[event] = HandlerSlot(event, counters.get(event), self._pinned)
            elif event in counters:
                self.slots[event].attribute = counters[event]
        for attribute in counters.values():
            if not hasattr(self._state, attribute):
                setattr(self._state, attribute, 0)

    def slot(self, event: Any) -> HandlerSlot:
        """The slot of a known event; a filter on it is ignored."""
        key = event.event if isinstance(event, FilteredEvent) else event
        try:
            return self.slots[key]
        except (KeyError, TypeError):
            raise ArgumentError(self._unknown(key)) from None

    def fire(self, engine: Any, event: Any, *event_args: Any) -> None:
        """Call the handlers of a known event that are due, with `engine` and what the event carries."""
        self.last_event = event
        slot = self.slots[event]
        slot.call(engine, self._count(slot), event_args)

    def finish(self, engine: Any, event: Any) -> None:
        """Call the handlers of an event that an exception of one of them has left, beginning with that one."""
        self.last_event = event
        slot = self.slots[event]
        slot.finish(engine, self._count(slot))

    def forget_unfinished(self) -> None:
        """Leave out what exceptions have left."""
        for slot in self.slots.values():
            slot.unfinished = []

    def add(self, event: Any, handler: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Compile `handler`, to be called with these arguments too, and append it to the event's slot."""
        if isinstance(event, EventsList):
            for each in event:
                self.add(each, handler, *args, **kwargs)
            return
        slot = self.slot(event)
        chosen = event.filter if isinstance(event, FilteredEvent) else None
        if chosen is not None and slot.attribute is None:
            raise ArgumentError(
                f"{slot.event} is not counted, so a filter on it has no meaning; add the handler without one"
            )
        takes_engine, takes_event = _calling_form(slot.event, handler, args, kwargs)
        call = _compile(handler, takes_engine, takes_event, args, kwargs)
        slot.registrations.append(HandlerRegistration(handler, chosen, call))
        slot.schedule(self._count(slot))
        if slot.event is Events.OPTIMIZER_STEP_COMPLETED:
            self._listen_for_optimizer_steps()

    def surround(self, event: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Call `before` ahead of all handlers that the event has now, `after` behind them; called again, anew."""
        slot = self.slot(event)
        chosen = event.filter if isinstance(event, FilteredEvent) else None
        inside = [each for each in slot.registrations if each.handler not in (before, after)]
        first, last = (
            HandlerRegistration(each, chosen, _compile(each, False, False, (), {})) for each in (before, after)
        )
        slot.registrations = [first, *inside, last]
        slot.schedule(self._count(slot))

    def has(self, handler: Callable[..., Any], event: Any | None = None) -> bool:
        """Whether `handler` listens to `event`, or, without one, to any."""
        if isinstance(event, EventsList):
            return any(self.has(handler, each) for each in event)
        if event is None:
            return any(r.handler == handler for slot in self.slots.values() for r in slot.registrations)
        known = self.slots.get(event.event if isinstance(event, FilteredEvent) else event)
        return known is not None and any(r.handler == handler for r in known.registrations)

    def remove(self, handler: Callable[..., Any], event: Any) -> None:
        """Take `handler` off `event`."""
        if isinstance(event, EventsList):
            for each in event:
                self.remove(handler, each)
            return
        slot = self.slot(event)
        kept = [r for r in slot.registrations if r.handler != handler]
        if len(kept) == len(slot.registrations):
            raise ArgumentError(f"{handler!r} is not a handler of {slot.event}; see has_event_handler")
        slot.registrations = kept
        slot.schedule(0)
        if slot.event is Events.OPTIMIZER_STEP_COMPLETED and not kept and not self._pinned:
            self.remove(self._optimizer_step.handler, Events.ITERATION_COMPLETED)

    def schedule(self) -> None:
        """Bring every slot up to date with the state's counters."""
        for slot in self.slots.values():
            slot.schedule(self._count(slot))

    def _unknown(self, event: Any) -> str:
        """What to say of an event that this engine does not know."""
        name = event if isinstance(event, str) else getattr(event, "name", "")
        known = {getattr(each, "name", str(each)): each for each in self.slots}
        near = nearest(str(name), known)
        if near is None:
            return f"{event!r} is not an event of this engine; register it first with engine.register_events"
        instead = known[near]
        named = instead if isinstance(instead, Events) else repr(instead)
        remedy = f"did you mean {named}? One of your own is to be registered first with engine.register_events"
        return f"{event!r} is not an event of this engine; {remedy}"

    def _listen_for_optimizer_steps(self) -> None:
        completed = self.slots[Events.ITERATION_COMPLETED]
        if self._optimizer_step not in completed.registrations:
            completed.registrations = [self._optimizer_step, *completed.registrations]
        completed.schedule(self._count(completed))

    def _tell_of_optimizer_step(self, engine: Any) -> None:
        """Fire OPTIMIZER_STEP_COMPLETED if this iteration ends a group, and go on with what is being fired."""
        if not self._state.group_end:
            return
        around, event = self.last_event, Events.OPTIMIZER_STEP_COMPLETED
        if self.slots[event].unfinished:
            self.finish(engine, event)
        elif self._pinned or self.slots[event].due <= self._state.optimizer_steps:
            engine._fire_event(event)
        self.last_event = around

    def iteration_of_optimizer_step(self) -> float:
        """The first iteration after which a handler of OPTIMIZER_STEP_COMPLETED may be due."""
        # An iteration ends one accumulation group at most.
        left = self.slots[Events.OPTIMIZER_STEP_COMPLETED].due - self._state.optimizer_steps
        return self._state.iteration + left

    def _count(self, slot: HandlerSlot) -> int:
        return getattr(self._state, slot.attribute) if slot.attribute else 0


@dataclass(frozen=True, slots=True)
class OptimizerStepFilter:
    """Due at iterations that may be an optimizer step for which a handler of OPTIMIZER_STEP_COMPLETED waits."""

    registry: Registry

    def matches(self, engine: Any, count: int) -> bool:
        """Always: whether the iteration is such a one is looked at by what is called."""
        return True

    def next_due(self, count: int) -> float:
        """The first such iteration from `count` on."""
        return max(count, self.registry.iteration_of_optimizer_step())


class RemovableEventHandle:
    """A handler on its event; `remove` it, or use the handle as a context manager that removes it at the end."""

    def __init__(self, event: AnyEvent | str, handler: Callable[..., Any], registry: Registry) -> None:
        self._event = event
        self._handler = handler
        self._registry = registry

    def remove(self) -> None:
        """Take the handler off; without effect when it is off already."""
        for event in self._event if isinstance(self._event, EventsList) else (self._event,):
            if self._registry.has(self._handler, event):
                self._registry.remove(self._handler, event)

    def __enter__(self) -> RemovableEventHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _calling_form(
    event: EventKey, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, bool]:
    """How the handler takes its call: whether the engine leads, and whether what the event carries comes next.

    With the engine before without it, with what the event carries before without; the first form that binds.
    """
    if not callable(handler):
        raise ArgumentTypeError(f"the handler of {event} is {handler!r}; it must be callable")
    carried = _EVENT_ARGUMENTS.get(event, ())
    # The fullest form that fits: what a handler can take it is given.
    forms = [(True, True), (True, False), (False, False)]
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError):  # some builtins tell no signature
        return forms[0]
    # A handler of the exception with one parameter means the exception and not the engine.
    if event is Events.EXCEPTION_RAISED or not signature.parameters.keys().isdisjoint(carried):
        forms.insert(1, (False, True))
    # The step of a scheduler would take the engine for an epoch, which it may be given and need not.
    if isinstance(getattr(handler, "__self__", None), LRScheduler):
        forms.insert(0, (False, False))
    for takes_engine, takes_event in forms:
        leading = ("engine",) if takes_engine else ()
        try:
            signature.bind(*leading, *(carried if takes_event else ()), *args, **kwargs)
        except TypeError:
            continue
        return takes_engine, takes_event
    given = ", ".join(["engine", *carried, *map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())])
    raise ArgumentError(
        f"the handler {getattr(handler, '__name__', handler)!r} of {event} takes {signature}, "
        f"but would be called with ({given}), with or without the engine"
    )


def _compile(
    handler: Callable[..., Any], takes_engine: bool, takes_event: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any]:
    # The engine is an argument, not kept: an engine that nobody holds any more, and the batch and output in its state,
    # are freed at once and not when the garbage collector next runs.
    if takes_engine and takes_event:
        if not args and not kwargs:
            return handler
        return lambda engine, *carried: handler(engine, *carried, *args, **kwargs)
    if takes_engine:
        return lambda engine, *carried: handler(engine, *args, **kwargs)
    if takes_event:
        return lambda engine, *carried: handler(*carried, *args, **kwargs)
    return lambda engine, *carried: handler(*args, **kwargs)
