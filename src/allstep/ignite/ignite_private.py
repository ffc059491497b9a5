"""Private names of Ignite's engine that its own handlers read, and that an engine of allstep therefore has to have.

Contract: `IgniteNames` is the half of `IgniteEngine` that Ignite's handlers look into. Handlers are kept as Ignite keeps
them, in `_event_handlers` and `_allowed_events`, because its profilers put their own in there. What Ignite's loop would
write is answered from allstep's run. Ignite's `run` ends in `_internal_run`, which here calls allstep's loop.

Where a release of Ignite lacks a name, nobody reads the attribute of that name. Two names are needed: without
`_internal_run` or `_fire_event` an engine cannot be made, and the error says for which release this was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakMethod, ref

import ignite
import ignite.distributed
from ignite.engine import Engine as OriginalEngine
from ignite.metrics import Metric

from allstep.errors import EngineError
from allstep.world import World, internals

NEEDED = ("_internal_run", "_fire_event")


class IgniteNames(OriginalEngine):
    """What Ignite's handlers read of an engine besides what its documentation names.

    Attributes:
        last_event_name: the event that was fired last, as Ignite knows it.
        begins_anew: what Ignite's `run` decided last.
    """

    last_event_name: Any = None
    begins_anew = True

    def begin_as_ignite(self, step: Callable[[Any, Any], Any]) -> None:
        """Set what Ignite's constructor sets.

        Raises:
            EngineError: the installed release of Ignite has another loop.
            ValueError: `step` is no function of (engine, batch).
        """
        missing = [name for name in NEEDED if not hasattr(OriginalEngine, name)]
        if missing:
            raise EngineError(
                f"PyTorch-Ignite {ignite.__version__} has no Engine.{missing[0]}, so allstep.ignite cannot run its "
                "loop; install pytorch-ignite 0.5"
            )
        OriginalEngine.__init__(self, step)

    @property
    def process_function(self) -> Callable[[Any, Any], Any]:
        """The step."""
        return self._process_function

    @process_function.setter
    def process_function(self, step: Callable[[Any, Any], Any]) -> None:
        self._process_function = step

    @property
    def _dataloader_iter(self) -> Iterator[Any] | None:
        # Whether there is one is what is asked; the loop's own is nobody's to read from.
        return iter(()) if self.is_under_way else None

    @_dataloader_iter.setter
    def _dataloader_iter(self, value: Any) -> None:
        pass  # Ignite's constructor sets it

    @property
    def _internal_run_generator(self) -> Iterator[Any] | None:
        return iter(()) if self.is_under_way else None

    @_internal_run_generator.setter
    def _internal_run_generator(self, value: Any) -> None:
        # Ignite's constructor sets it, and its `run` where it has decided that the run begins anew.
        self.begins_anew = True

    def _internal_run(self) -> Any:
        return self.run_loop()

    def _internal_run_legacy(self) -> Any:
        return self.run_loop()

    @property
    def state_dict_user_keys(self) -> list[str]:
        """Names of state attributes to save and load besides the engine's own; append yours."""
        return self._state_dict_user_keys

    @state_dict_user_keys.setter
    def state_dict_user_keys(self, keys: list[str]) -> None:
        self._state_dict_user_keys = keys

    def has_handlers(self, event: Any) -> bool:
        """Whether anything listens to an event of Ignite's kind."""
        return bool(self._event_handlers.get(event))

    def call_handlers(self, event: Any, *arguments: Any, **named: Any) -> None:
        """Note the event, and call all that listen to it as Ignite does."""
        if self.has_handlers(event):
            OriginalEngine._fire_event(self, event, *arguments, **named)
        else:
            # Ignite would make an empty list of handlers, which it later takes for somebody who listens.
            self.last_event_name = event

    def call_without_updates(self, event: Any) -> None:
        """The same of an iteration in which this rank has no batch: metrics are not updated, but compute with others."""
        everybody = self._event_handlers[event]
        self._event_handlers[event] = others = [each for each in everybody if not _is_update(each[0])]
        before = len(others)
        try:
            self.call_handlers(event)
        finally:
            self._event_handlers[event] = [*everybody, *others[before:]]

    def allow(self, event: Any) -> None:
        """Have an event of allstep known, which Ignite has none of."""
        if event not in self._allowed_events:
            self._allowed_events.append(event)

    def forget_place(self) -> None:
        """Forget where Ignite's loop would begin in the epoch; allstep's knows."""
        self._init_iter = None


def _is_update(handler: Callable[..., Any]) -> bool:
    """Whether a handler gives an output to a metric of Ignite."""
    behind = getattr(handler, "_parent", None)  # a filter stands around it
    method = handler if behind is None else behind()
    return isinstance(getattr(method, "__self__", None), Metric) and method.__name__ == "iteration_completed"


class IgniteDistributed:
    """What `ignite.distributed` takes for the ranks: those of the open World, from a run over several ranks on.

    It notices the World's process group by itself, but not the group's end. Learning about it crosses ranks, so it is
    done where all ranks are at the same place.
    """

    def __init__(self) -> None:
        self._entered: ref[World] | None = None

    def enter(self, world: World) -> None:
        """Have it know the World's ranks; called by all of them."""
        if self._entered is not None and self._entered() is world:
            return
        self._entered = ref(world)
        ignite.distributed.get_world_size()  # asking makes it look
        internals(world).before_close(WeakMethod(self.leave))

    def leave(self, failed: bool = False) -> None:
        """Have it know no ranks, before their process group is gone. Without the names it keeps those that were."""
        utils = ignite.distributed.utils
        if hasattr(utils, "_set_model") and hasattr(utils, "_SerialModel"):
            utils._set_model(utils._SerialModel(), temporary=True)


def step_of(engine: OriginalEngine) -> Callable[[Any, Any], Any]:
    """The step of an engine that Ignite made."""
    step: Callable[[Any, Any], Any] = engine._process_function
    return step
