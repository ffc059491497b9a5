"""Handlers: adding them to events, taking them off, and firing events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from allstep.engine.events import AnyEvent, EventEnum
from allstep.engine.registry import EventKey, Registry, RemovableEventHandle
from allstep.engine.state import State

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
            raise TypeError(f"event_to_attr is {counters!r}; it must map events to names of state attributes")
        for event in events:
            if not isinstance(event, EventEnum | str):
                raise TypeError(f"{event!r} is not an event; give members of an EventEnum, or strings")
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
