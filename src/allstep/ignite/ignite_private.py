"""Private names of Ignite's engine that its own handlers read, and that an engine of allstep therefore has to have.

Contract: `IgniteNames` is the half of `IgniteEngine` that Ignite's handlers look into. Handlers are kept as Ignite has
them, in `_event_handlers` and `_allowed_events`, because its profilers put their own in there. What Ignite's loop would
write is answered from allstep's run. Ignite's `run` ends in `_internal_run`, which here calls allstep's loop.

Where a release of Ignite lacks a name of an attribute, nobody reads it. The names in `NEEDED` are called: without one
an engine cannot be made, and the error says for which releases this was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from inspect import ismethod
from typing import Any
from weakref import WeakMethod, ref

import ignite.distributed
from ignite.engine import DeterministicEngine as OriginalDeterministicEngine
from ignite.engine import Engine as OriginalEngine
from ignite.engine import Events as IgniteEvents
from ignite.engine import deterministic
from ignite.metrics import Metric, RunningAverage

import ignite
from allstep.engine import Extension
from allstep.errors import EngineError
from allstep.world import World, internals

NEEDED = ("_internal_run", "_fire_event", "_handler_wrapper")
NEEDED_OF_DETERMINISTIC = ("_init_run", "_setup_seed", "_get_data_length")
NEEDED_OF_MODULE = ("_get_rng_states", "_set_rng_states")


class IgniteNames(OriginalEngine):
    """What Ignite's handlers read of an engine besides what its documentation names.

    Attributes:
        last_event_name: the event that was fired last, as Ignite knows it.
        begins_anew: what Ignite's `run` decided last.
    """

    last_event_name: Any = None
    begins_anew = True
    is_under_way: bool  # by the other half, as are the next
    extension: Extension
    run_loop: Callable[[], Any]
    state: Any

    def begin_as_ignite(self, step: Callable[[Any, Any], Any]) -> None:
        """Set what Ignite's constructor sets.

        Raises:
            EngineError: the installed release of Ignite has another loop.
            ValueError: `step` is no function of (engine, batch).
        """
        _check_has(OriginalEngine, NEEDED)
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
        # Where there is none Ignite begins a run anew whose last epoch has begun, so that one that failed in it would
        # train all again. A run of one epoch is an evaluation as a rule, which is done whole.
        left = self.extension.has_failed and (self.state.max_epochs or 2) > 1
        return iter(()) if self.is_under_way or left else None

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

    def _handler_wrapper(self, handler: Callable[..., Any], event_name: Any, event_filter: Callable[..., Any]) -> Any:
        filtered: Any = OriginalEngine._handler_wrapper(self, handler, event_name, event_filter)
        if ismethod(handler):  # a weak reference to a bound method is dead at once, and nobody finds the handler
            filtered._parent = WeakMethod(handler)
        return filtered

    def has_handlers(self, event: Any) -> bool:
        """Whether anything listens to an event of Ignite's kind."""
        return bool(self._event_handlers.get(event))

    def swallows_exceptions(self) -> bool:
        """Whether a handler of EXCEPTION_RAISED is the script's or Ignite's; those of allstep let exceptions pass."""
        handlers = self._event_handlers.get(IgniteEvents.EXCEPTION_RAISED, [])
        return not all(_is_of_allstep(_unfiltered(each[0])) for each in handlers)

    def call_handlers(self, event: Any, *arguments: Any, **named: Any) -> None:
        """Note the event, and call all that listen to it as Ignite does."""
        if self.has_handlers(event):
            OriginalEngine._fire_event(self, event, *arguments, **named)
        else:
            # Ignite would make an empty list of handlers, which it later takes for somebody who listens.
            self.last_event_name = event

    def call_without_batch(self, event: Any, *, has_output: bool) -> None:
        """The same where this rank has no batch and others have: metrics are not updated, but compute with the others'.

        Args:
            event: of Ignite's kind.
            has_output: the step ran on a filler; else only those are called that can do without an output.
        """
        everybody = self._event_handlers[event]
        heard = [each for each in everybody if has_output or _needs_no_output(each[0])]
        self._event_handlers[event] = others = [
            each if metric is None else (partial(_average_with_others, metric), (), {})
            for each, metric in ((each, _updated_by(each[0])) for each in heard)
            if metric is None or isinstance(metric, RunningAverage)
        ]
        before = len(others)
        try:
            self.call_handlers(event)
        finally:
            self._event_handlers[event] = [*everybody, *others[before:]]

    def allow(self, event: Any) -> None:
        """Have an event of allstep known, which Ignite has none of."""
        if event not in self._allowed_events:
            self._allowed_events.append(event)

    def surround_handlers(self, event: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Put `before` ahead of all handlers of an event of Ignite's kind and `after` behind them."""
        inside = [each for each in self._event_handlers[event] if each[0] not in (before, after)]
        self._event_handlers[event] = [(before, (), {}), *inside, (after, (), {})]

    def all_handlers(self) -> list[Callable[..., Any]]:
        """What listens to any event, each once, without the filters around them."""
        found: list[Callable[..., Any]] = []
        for registered in self._event_handlers.values():
            for handler in map(_unfiltered, (each[0] for each in registered)):
                if handler is not None and handler not in found:
                    found.append(handler)
        return found

    def forget_place(self) -> None:
        """Forget where Ignite's loop would begin in the epoch; allstep's knows."""
        self._init_iter = None


class DeterministicNames(IgniteNames, OriginalDeterministicEngine):
    """What Ignite's deterministic engine does, as functions that another loop can call at the right moments."""

    def begin_as_deterministic(self) -> None:
        """Set what its constructor sets, with its handlers, which seed at the run's start and at each pass's end.

        Raises EngineError where the installed release of Ignite does it in another way.
        """
        _check_has(OriginalDeterministicEngine, NEEDED_OF_DETERMINISTIC)
        _check_has(deterministic, NEEDED_OF_MODULE)
        self.state_dict_user_keys.append("rng_states")
        self.state.rng_states = None
        self._dataloader_len: int | None = None
        self.add_event_handler(IgniteEvents.STARTED, self._init_run)
        passes_end = IgniteEvents.DATALOADER_STOP_ITERATION | IgniteEvents.TERMINATE_SINGLE_EPOCH
        self.add_event_handler(passes_end, self._setup_seed)

    def seed_first_pass(self, *, is_drawn_by_sampler: bool) -> None:
        """Seed for the pass in which a run begins or goes on: what is read and dropped was drawn from its beginning."""
        self._dataloader_len = self._get_data_length(self.state.dataloader)
        self._setup_seed(iteration=None if is_drawn_by_sampler else 0)

    def random_states(self) -> list[Any]:
        """The states of the random generators of Python, torch and numpy."""
        return list(deterministic._get_rng_states())

    def take_up_random_states(self) -> None:
        """Go on with the generators as they were saved, inside a pass."""
        states, length = self.state.rng_states, self._dataloader_len
        if states is not None and length is not None and self.state.iteration % length:
            deterministic._set_rng_states(states)
            self.state.rng_states = None


def _check_has(owner: Any, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise EngineError(
            f"PyTorch-Ignite {ignite.__version__} has no {owner.__name__}.{missing[0]}, by which allstep.ignite runs "
            "its loop; install pytorch-ignite 0.5"
        )


def _unfiltered(handler: Callable[..., Any]) -> Callable[..., Any] | None:
    """The handler that a filter stands around; None where it is gone."""
    behind = getattr(handler, "_parent", None)
    return handler if behind is None else behind()


def _is_of_allstep(handler: Callable[..., Any] | None) -> bool:
    module = str(getattr(getattr(handler, "func", handler), "__module__", ""))
    return module.partition(".")[0] == "allstep"


def _needs_no_output(handler: Callable[..., Any]) -> bool:
    """Whether a handler is a metric's, with which others compute, or of allstep, which knows of ranks without one."""
    method = _unfiltered(handler)
    return isinstance(getattr(method, "__self__", None), Metric) or _is_of_allstep(method)


def _updated_by(handler: Callable[..., Any]) -> Metric | None:
    """The metric of Ignite to which a handler gives an output."""
    method = _unfiltered(handler)
    owner = getattr(method, "__self__", None)
    is_update = isinstance(owner, Metric) and getattr(method, "__name__", "") == "iteration_completed"
    return owner if is_update else None


def _average_with_others(metric: RunningAverage) -> None:
    """Take part in a running average, whose update crosses ranks, with what leaves it as it is."""
    value = metric.compute()
    metric.update(0.0 if value is None else value)


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
        utils: Any = ignite.distributed.utils
        if hasattr(utils, "_set_model") and hasattr(utils, "_SerialModel"):
            utils._set_model(utils._SerialModel(), temporary=True)


def step_of(engine: OriginalEngine) -> Callable[[Any, Any], Any]:
    """The step of an engine that Ignite made."""
    step: Callable[[Any, Any], Any] = engine._process_function
    return step
