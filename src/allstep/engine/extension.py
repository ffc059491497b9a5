"""What a library that extends `Engine` may ask of it, besides what a training script does.

Contract: `engine.extension` is the one door for metrics, checkpoints and handlers. It reads where a run stands, which
of its parts take part in the comparison of ranks, and lets a handler decide what `Engine.run` raises at its end. All of
it may be called from handlers and between runs. Nothing here crosses ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any, Protocol

from allstep.coordination import RequestKind
from allstep.engine.events import AnyEvent, Events
from allstep.engine.handshake import Reduction
from allstep.engine.rank_sums import RankSum
from allstep.engine.registry import EventKey, Registry
from allstep.engine.run import Run
from allstep.engine.run_plan import StepSettings, is_done
from allstep.engine.skipping import skip_of
from allstep.engine.source import END
from allstep.engine.state import State
from allstep.errors import EngineError

_WITH_A_BATCH = frozenset(
    {
        *(Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED),
        *(Events.OPTIMIZER_STEP_COMPLETED, Events.ITERATION_COMPLETED),
    }
)


class Stateful(Protocol):
    """What a checkpoint can save and load."""

    def state_dict(self) -> Mapping[str, Any]:
        """What is to be saved."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take back what `state_dict` gave."""
        ...


class HandlerKeeper(Protocol):
    """Who keeps the handlers of an engine in place of its registry."""

    def handlers(self) -> list[Callable[..., Any]]:
        """What listens to the engine's events, each once."""
        ...

    def surround(self, event: Any, before: Callable[[], None], after: Callable[[], None], /) -> None:
        """Call `before` ahead of all handlers that the event has now, `after` behind them; called again, anew."""
        ...


class Extension:
    """The door of one engine for what extends it.

    Attributes:
        reductions: what is reduced over ranks at the engine's events; ranks compare it when a run begins. Append and
            remove between runs, on every rank alike.
        states: what is attached to the engine and has a state to be saved with it, by name; see `add_state`.
    """

    def __init__(self, run: Run, registry: Registry) -> None:
        self._run = run
        self._registry = registry
        self.reductions: list[Reduction] = []
        self.states: dict[str, Stateful] = {}
        self._elsewhere: HandlerKeeper | None = None

    def add_state(self, stateful: Stateful, name: str | None = None) -> str:
        """Have a `Checkpoint` of this engine save and load `stateful` by itself; called by its `attach`.

        Args:
            stateful: has `state_dict` and `load_state_dict`. The same object given again keeps its name.
            name: what it is called in checkpoints; by default its class's name. Where that is taken, a number follows,
                in the order of attaching, which is therefore the same on every rank and in every start of a script.

        Returns:
            The name that it has.
        """
        for known, other in self.states.items():
            if other is stateful:
                return known
        first = name or type(stateful).__name__
        chosen, number = first, 1
        while chosen in self.states:
            number += 1
            chosen = f"{first} {number}"
        self.states[chosen] = stateful
        return chosen

    def remove_state(self, stateful: Stateful) -> None:
        """Undo `add_state`; nothing where it was not called."""
        self.states = {name: other for name, other in self.states.items() if other is not stateful}

    def sum_over_ranks(self, name: str, read: Callable[[], int], landed: Callable[[int], None]) -> RankSum:
        """Have a number summed over the ranks in the votes of the coming runs; called by `attach`, on every rank alike.

        Args:
            name: what ranks compare when a run begins.
            read: gives this rank's number, an int, when a vote is cast.
            landed: called with the total of all ranks, at the same iteration on all of them: about once a window, with
                what they said one window before, and just before EPOCH_COMPLETED with what they say then. Alone, only
                before EPOCH_COMPLETED.

        Returns:
            What `remove_sum` takes.
        """
        number = RankSum(name, read, landed)
        self._run.sums.append(number)
        return number

    def remove_sum(self, number: RankSum) -> None:
        """Undo `sum_over_ranks`, between runs, on every rank alike; nothing where that was done."""
        self._run.sums = [each for each in self._run.sums if each is not number]

    def surround(self, event: AnyEvent, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Have `before` called ahead of all handlers that an event has now, and `after` behind them.

        Called again, they are put around those that it has then.
        """
        (self._elsewhere or self._registry).surround(event, before, after)

    def reschedule(self) -> None:
        """Have filters asked anew when they are due; to be called when one of them has changed its mind."""
        self._registry.schedule()

    @property
    def handlers(self) -> list[Callable[..., Any]]:
        """What listens to the engine's events, each once."""
        if self._elsewhere is not None:
            return self._elsewhere.handlers()
        found: list[Callable[..., Any]] = []
        for slot in self._registry.slots.values():
            found += [each.handler for each in slot.registrations if each.handler not in found]
        return found

    @property
    def settings(self) -> StepSettings:
        """What the engine was made with, besides its step."""
        return self._run.settings

    @property
    def state(self) -> State:
        """The state that the engine counts in."""
        return self._run.state

    @property
    def is_under_way(self) -> bool:
        """Whether a run has begun and not ended; it may be suspended."""
        return self._run.is_under_way

    @property
    def has_failed(self) -> bool:
        """Whether an exception ended the last run, and none has gone on from there."""
        return self._run.has_failed

    @property
    def holding(self) -> Set[RequestKind]:
        """What was asked of the run and holds now, on all ranks, without having been acted on."""
        return self._run.holding

    def keep_handlers_elsewhere(self, keeper: HandlerKeeper) -> None:
        """Have handlers be the business of `keeper`, for an engine that overrides `_fire_event` and calls its own."""
        self._elsewhere = keeper

    def note_event(self, event: EventKey) -> None:
        """Note what is fired, for such an engine."""
        self._registry.last_event = event

    def replace_state(self, state: State) -> None:
        """Have an engine whose `state` is this one's count and keep results in `state`, which has all its attributes.

        Where the epoch began is told by `iteration` and `epoch_length`. It may be the present state, where somebody has
        set its counters.

        Raises:
            EngineError: the engine is running.
        """
        run = self._run
        if run.is_running:
            raise EngineError("this engine is running; set its state before run(), or after it")
        run.state = state
        done, length = state.iteration, state.epoch_length
        run.epoch_began_at, run.passes_began_at = done - (done % length if length else 0), 0
        run.epoch_is_open = bool(length and done % length and state.epoch > done // length)
        run.step_is_open, run.steps_in_group = False, 0
        self._registry.follow(state)
        state.skip_with(skip_of(run))

    def end_epoch(self) -> None:
        """Take the epoch in which the last run was left for ended, so that the next run begins another one.

        Raises:
            EngineError: the engine is running.
        """
        run = self._run
        if run.is_running:
            raise EngineError("this engine is running; terminate_epoch() ends its epoch")
        run.epoch_is_open = run.step_is_open = False
        run.epoch_began_at = run.passes_began_at = run.steps_done
        run.data_state = END

    def survive(self, decide: Callable[[BaseException], bool] | None) -> None:
        """Have runs go on after an exception for which `decide` says so, once EXCEPTION_RAISED was fired for it.

        After one of an iteration the next epoch begins; after any other `run` returns, without COMPLETED. Where ranks
        vote nobody is asked: the others wait for this one, so that the exception leaves the run.
        """
        self._run.survives = decide

    def keep_epoch_length(self) -> None:
        """Have epochs keep their length when data is replaced, where else each would be one pass over the new data."""
        self._run.keeps_length = True

    @property
    def epoch_began_at(self) -> int:
        """Iterations of the run that were done when the present epoch began."""
        return self._run.epoch_began_at

    @property
    def epoch_ends_at(self) -> float:
        """The iteration at which the present epoch ends; infinity where only the end of its data tells."""
        return self._run.epoch_ends_at

    @property
    def epoch_is_open(self) -> bool:
        """Whether epoch `state.epoch` has begun and not ended."""
        return self._run.epoch_is_open

    @property
    def window_ends_at(self) -> int:
        """The iteration at which the window ends that ranks have agreed on; the present one where nobody votes."""
        return self._run.window_ends_at if self._run.votes else self._run.state.iteration

    @property
    def is_nested(self) -> bool:
        """Whether the present run is inside another engine's, as an evaluation in a handler is."""
        return self._run.is_nested

    @property
    def is_complete(self) -> bool:
        """Whether all epochs or iterations that were asked for have been run."""
        state = self._run.state
        return is_done(state.iteration, self._run.epochs_completed, state.max_epochs, state.max_iters)

    @property
    def is_repeated(self) -> bool:
        """Whether the present iteration was begun before, in an accumulation group that was not completed."""
        return self._run.state.iteration <= self._run.redone_until

    @property
    def failing(self) -> str | None:
        """Why the run that is under way has failed, as far as this rank knows, also before the others do; else None.

        May be asked from any thread.
        """
        return self._run.failing if self._run.is_under_way else None

    @property
    def is_idle(self) -> bool:
        """Whether this rank has no batch in the present iteration, so that `state.output` means nothing.

        At the end of an epoch or a run it is False, even where the last iteration was such a one.
        """
        return not self._run.state.active and self._registry.last_event in _WITH_A_BATCH

    def count_samples(self) -> None:
        """Have batches counted in the coming runs before the step, which may change them, is given them."""
        self._run.counts_samples = True

    def samples_in_batch(self) -> int:
        """How many samples this rank's present batch has; by what is left of it, unless `count_samples` was called."""
        samples = self._run.state.samples
        return self._run.count_batch(self._run.state.batch) if samples is None else samples

    def samples_in_group(self) -> int:
        """How many samples all ranks have in the present accumulation group, or iteration where there are no groups.

        The same number on every rank, without asking the others. Where nobody votes, call `count_samples` before.
        """
        run = self._run
        if run.handshake is None:
            return self.samples_in_batch()
        return run.group_totals[(run.state.iteration - 1 - run.window_began_at) // run.handshake.agreement.group_size]

    @property
    def leaving(self) -> BaseException | None:
        """What `run` raises once, in place of returning, when the run has ended; None where it returns."""
        return self._run.leaving

    def leave_with(self, error: BaseException) -> None:
        """Have `run` raise `error` at the end of the present run."""
        self._run.leaving = error
