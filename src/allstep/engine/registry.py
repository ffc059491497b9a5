"""Which handlers listen to which events of one engine, ready to be called.

Contract: an engine owns one `Registry`. `add` checks the handler's signature against how it will be called and compiles
it to a call that takes the engine. Each event has a `HandlerSlot`; its `due` is the smallest count of the event's
counter at which anything has to be called, so that the loop's one test `slot.due <= count` is all that an event costs
when nobody listens or no listener is due. `HandlerSlot.schedule(count)` brings `due` up to date for counts from `count`
on; it must be called when the counter was moved other than by counting up.

Handlers: adding them to events, taking them off, and firing events.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

from allstep.engine.events import COUNTERS, NEVER, AnyEvent, EventEnum, Events, EventsList, Filter, FilteredEvent
from allstep.engine.state import State
from allstep.errors import ArgumentError, ArgumentTypeError

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

    __slots__ = ("attribute", "due", "event", "pinned", "registrations")

    def __init__(self, event: EventKey, attribute: str | None, pinned: bool) -> None:
        self.event = event
        self.attribute = attribute
        self.pinned = pinned
        self.registrations: list[HandlerRegistration] = []
        self.due: float = ALWAYS if pinned else NEVER

    def schedule(self, count: int) -> None:
        """Set `due` to the smallest count from `count` on at which a handler may be due."""
        if self.pinned or any(registration.filter is None for registration in self.registrations):
            self.due = ALWAYS
        else:
            self.due = min((r.filter.next_due(count) for r in self.registrations if r.filter), default=NEVER)

    def call(self, engine: Any, count: int, event_args: tuple[Any, ...]) -> None:
        """Call the handlers that are due at `count`, in the order of registration.

        One that is added meanwhile is called too, one that is removed is called for the last time.
        """
        for registration in self.registrations:
            if registration.filter is None or registration.filter.matches(engine, count):
                registration.call(engine, *event_args)
        if self.due != ALWAYS:
            self.schedule(count + 1)


class Registry:
    """Slots by event. `pinned` makes every event listened to, for an engine that overrides the firing."""

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self.slots: dict[EventKey, HandlerSlot] = {}
        self.register(Events, COUNTERS)

    def register(self, events: Iterable[EventKey], counters: Mapping[Any, str]) -> None:
        """Make these events known, with the state's attribute that counts each."""
        for event in events:
            if event not in self.slots:
                self.slots[event] = HandlerSlot(event, counters.get(event), self._pinned)
            elif event in counters:
                self.slots[event].attribute = counters[event]

    def slot(self, event: Any) -> HandlerSlot:
        """The slot of a known event; a filter on it is ignored."""
        key = event.event if isinstance(event, FilteredEvent) else event
        try:
            return self.slots[key]
        except (KeyError, TypeError):
            raise ArgumentError(
                f"{event!r} is not an event of this engine; register it first with engine.register_events"
            ) from None

    def add(
        self, engine: Any, event: Any, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Compile `handler` and append it to the event's slot."""
        if isinstance(event, EventsList):
            for each in event:
                self.add(engine, each, handler, args, kwargs)
            return
        slot = self.slot(event)
        chosen = event.filter if isinstance(event, FilteredEvent) else None
        if chosen is not None and slot.attribute is None:
            raise ArgumentError(
                f"{slot.event} is not counted, so a filter on it has no meaning; add the handler without one"
            )
        takes_engine, takes_event = _calling_form(engine, slot.event, handler, args, kwargs)
        call = _compile(handler, takes_engine, takes_event, args, kwargs)
        slot.registrations.append(HandlerRegistration(handler, chosen, call))
        count = getattr(engine.state, slot.attribute) if slot.attribute else 0
        slot.schedule(count)

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

    def schedule(self, state: Any) -> None:
        """Bring every slot up to date with the state's counters."""
        for slot in self.slots.values():
            slot.schedule(getattr(state, slot.attribute) if slot.attribute else 0)


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
    engine: Any, event: EventKey, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, bool]:
    """How the handler takes its call: whether the engine leads, and whether what the event carries comes next.

    With the engine before without it, with what the event carries before without; the first form that binds.
    """
    if not callable(handler):
        raise ArgumentTypeError(f"the handler of {event} is {handler!r}; it must be callable")
    carried = _EVENT_ARGUMENTS.get(event, ())
    forms = [(True, True), (True, False), (False, False)]
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError):  # some builtins tell no signature
        return forms[0]
    if event is Events.EXCEPTION_RAISED or not signature.parameters.keys().isdisjoint(carried):
        forms.insert(1, (False, True))
    for takes_engine, takes_event in forms:
        leading = (engine,) if takes_engine else ()
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


H = TypeVar("H", bound=Callable[..., Any])


class Listening:
    """What an engine does with handlers. Every event, built in or fired by a user, goes through `_fire_event`.

    A subclass that overrides `_fire_event` is given every event, whether anybody listens or not; it calls
    `super()._fire_event` for the handlers to run.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.registry = Registry(pinned=type(self)._fire_event is not Listening._fire_event)
        self.last_event_name: EventKey | None = None

    def register_events(self, *events: EventEnum | str, event_to_attr: Mapping[Any, str] | None = None) -> None:
        """Make events of your own known to this engine, so that they can have handlers and be fired.

        Args:
            events: members of an `EventEnum`, or strings.
            event_to_attr: for filters, the attribute of the state that counts each event; made, at 0, if absent.

        Raises:
            TypeError: something given is no event, or event_to_attr no mapping.
        """
        counters = {} if event_to_attr is None else event_to_attr
        if not isinstance(counters, Mapping):
            raise ArgumentTypeError(f"event_to_attr is {counters!r}; it must map events to names of state attributes")
        for event in events:
            if not isinstance(event, EventEnum | str):
                raise ArgumentTypeError(f"{event!r} is not an event; give members of an EventEnum, or strings")
        self.registry.register(events, counters)
        for attribute in counters.values():
            if not hasattr(self.state, attribute):
                setattr(self.state, attribute, 0)

    def has_registered_events(self, event: Any) -> bool:
        """Whether this engine knows the event."""
        return event in self.registry.slots

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
            ValueError: the event is not registered, or the handler cannot take the call.
        """
        self.registry.add(self, event, handler, args, kwargs)
        return RemovableEventHandle(event, handler, self.registry)

    def has_event_handler(self, handler: Callable[..., Any], event: AnyEvent | str | None = None) -> bool:
        """Whether `handler` listens to `event`, or, without one, to any."""
        return self.registry.has(handler, event)

    def remove_event_handler(self, handler: Callable[..., Any], event: AnyEvent | str) -> None:
        """Take `handler` off `event`. Raises ValueError when it is not there."""
        self.registry.remove(handler, event)

    def fire_event(self, event: EventEnum | str) -> None:
        """Fire an event of your own from a step or a handler. Raises ValueError when it is not registered."""
        self._fire_event(self.registry.slot(event).event)

    def _fire_event(self, event: Any, *event_args: Any) -> None:
        """Call the handlers of an event that are due; the one place through which every event goes."""
        self.last_event_name = event
        slot = self.registry.slots[event]
        slot.call(self, getattr(self.state, slot.attribute) if slot.attribute else 0, event_args)
