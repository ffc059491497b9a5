"""`Checkpoint`: saves everything that a run needs to go on, and brings it back.

Contract: every rank makes one alike and attaches it to the engine that trains; what else is to be saved it finds by
itself, or is given (`collection`). `resume`, before the run and after all that is saved was made, makes this job the
owner of the folder, finds the newest whole checkpoint, or the one that was asked for, and loads it into the objects.
What is decided here is decided alike on every rank. All methods are called from the main thread.

When a run saves: on the last iteration of an accumulation group only, after all other handlers of the same event. It
saves when a checkpoint is due, when the run is terminated, preemption included, and at its end. A run that was
terminated as failed is not saved there, nor is a save committed once a rank has asked for such an end. An exception
saves nothing, but a save under way is given a moment to end before the exception goes on, since other ranks still take
part in it. A run raises at its end where that could not be saved and it was preempted, or nothing of it was saved.

How a save goes: `collect_states` asks the objects for their states, the store copies them, and training goes on while a
thread writes. Nothing below calls back into a `Checkpoint`.

The random generators are put back last, when the resumed run begins, so that what is drawn between `resume` and the run
does not count. Inside an epoch they are put back once more before its first batch is taken, so that what begins a pass
over the data does not count twice.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from allstep.checkpoint.catalog import Verify
from allstep.checkpoint.collection import Collection
from allstep.checkpoint.objects import collect_states
from allstep.checkpoint.resumption import Resumption, generators_restorer, own_state, saved_metrics, without_twins
from allstep.checkpoint.retention import KeepBest
from allstep.checkpoint.save_schedule import SaveEvery, SaveSchedule, read_every
from allstep.checkpoint.selection import launches_of, overruled_resume, restarted_launches, resume_from
from allstep.checkpoint.store import Busy, Loaded, Store
from allstep.engine import Engine, Events
from allstep.engine.registry import RemovableEventHandle
from allstep.engine.resume import position_from
from allstep.engine.state import is_one_number
from allstep.errors import ArgumentError, CheckpointError, FolderInUseError, Preempted
from allstep.world import World, current_data_ranks

T = TypeVar("T")

log = logging.getLogger("allstep.checkpoint")

AT_EXCEPTION_S = 5.0
"""Seconds for which an exception waits for a save under way."""

_OWN_FACTS = frozenset({"epoch", "iteration", "stop_reason", "seed", "launches", "collected"})


@dataclass(slots=True)
class _RunSaves:
    """The saves of an attached engine's latest run.

    Attributes:
        schedule: when the next is due.
        handles: of the handlers that the run was given.
        saved_at: where the last one that was begun was taken; see `_place`.
        lacks_rating: whether that one was left unrated though there were metrics.
        ended_at: the place of which a save at the run's end was tried last.
    """

    schedule: SaveSchedule
    handles: list[RemovableEventHandle]
    saved_at: tuple[int, int, str | None] | None = None
    lacks_rating: bool = False
    ended_at: tuple[int, int, str | None] | None = None


class Checkpoint:
    """Saves objects to a folder and resumes from it.

    Args:
        folder: a path or an address that fsspec knows, which all ranks reach; or a `Store`.
        objects: what to save, by name, besides what is found: modules, optimizers, schedulers, scalers, metrics,
            engines, generators, and whatever else has `state_dict` and `load_state_dict`. `PerRank(object)` says that
            ranks differ in it. Found are the engine that the checkpoint is attached to, what is attached to that and
            has a state, what its step and handlers use, and what the World has wrapped; an object that was given is
            saved under the name given.
        every: when to save besides the run's end: iterations as an int, a timedelta, a text such as "epoch" or
            "10 minutes", or several of these in a tuple.
        keep_last: how many of the newest checkpoints to keep; None keeps all.
        keep_best: how many of the best to keep besides: (count, name of a metric, "max" or "min").
        metrics: `engine -> mapping`, numbers to rate each checkpoint by. By default those in `engine.state.metrics`, at
            an epoch's end and at the end of a run that was not broken off; a save inside an epoch, where they are of
            the epoch before, is not rated.
        facts: what else the manifest should say, such as the run's configuration; as JSON takes it. It says epoch,
            iteration, stop_reason, seed and launches by itself.
        leave_out: objects that are not to be saved though they would be found, such as a frozen teacher.
        verify: see `Store`.
        strict: see `Store`.
        busy: see `Store`.
        take_over: see `Store`.

    Raises:
        ArgumentError: `every`, keep_last, keep_best, verify or busy has no such value, or a fact has a name that is
            taken.
        UnsupportedStateError: an object has no state that can be saved.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | Store,
        objects: Mapping[str, Any] | None = None,
        *,
        every: SaveEvery | Sequence[SaveEvery] | None = "epoch",
        keep_last: int | None = 3,
        keep_best: KeepBest | None = None,
        metrics: Callable[[Engine], Mapping[str, Any]] | None = None,
        facts: Mapping[str, Any] | None = None,
        leave_out: Sequence[Any] = (),
        verify: Verify = "full",
        strict: bool = False,
        busy: Busy = "wait",
        take_over: bool = False,
    ) -> None:
        if taken := sorted(_OWN_FACTS & dict(facts or {}).keys()):
            raise ArgumentError(
                f"facts has {', '.join(taken)}, which the checkpoint says of itself and resumes by; give your own "
                "another name, such as config"
            )
        self._times = read_every(every)
        self.metrics = metrics
        self.facts = dict(facts or {})
        self._launches = launches_of(os.environ)
        self._engines: list[Engine] = []
        self._collection = Collection(objects or {}, leave_out)
        if isinstance(folder, Store):
            self.store = folder
        else:
            self.store = Store(
                os.fspath(folder),
                keep_last=keep_last,
                keep_best=keep_best,
                verify=verify,
                strict=strict,
                busy=busy,
                take_over=take_over,
            )
        self._runs: dict[Engine, _RunSaves] = {}
        self._resumption: Resumption | None = None

    @property
    def objects(self) -> Mapping[str, Any]:
        """What is saved, by name: what was given, and what was found when a run began or was resumed last."""
        return self._collection.objects

    def attach(self, engine: Engine) -> Checkpoint:
        """Save during the runs of `engine`; returns self.

        Raises:
            CheckpointError: `resume` was called already, without knowing which engines train.
        """
        if self._collection.was_resumed:
            raise CheckpointError(
                "attach the checkpoint before resume(): engines are loaded as what they are for, the ones that it is "
                "attached to as those that train, others as evaluators that begin anew"
            )
        self._engines.append(engine)
        engine.add_event_handler(Events.STARTED, self._start)
        return self

    def resume(self, at: str | os.PathLike[str] = "auto", *, partial: bool = False) -> Loaded | None:
        """Load a checkpoint into the objects, on every rank.

        Args:
            at: the path of one, or of another folder whose newest whole one is meant; "none" to begin anew; or "auto"
                for what `allstep run --resume` says (the environment variable ALLSTEP_RESUME), and where it says
                nothing, the newest whole one in this folder. A restart by the launcher goes on from what was saved
                since the launch, whatever ALLSTEP_RESUME says. Rank 0's environment decides.
            partial: leave objects that the checkpoint does not have as they are.

        Returns:
            What was loaded; None where there is nothing to resume from.

        Raises:
            FolderInUseError: the checkpoint is attached, and its folder belongs to another job that is alive.
            CheckpointError: an engine that the checkpoint is attached to is running; the path that was asked for has
                none, one that may be whole cannot be read now, or objects are missing in it; on every rank.
        """
        script_at = os.fspath(at)
        if any(each.is_running for each in self._engines):
            raise CheckpointError("call resume() before run(), not inside of it: the run has begun from its beginning")
        self._collection.note_resume(self._engines)
        if self._engines:
            self._claim()  # before anything is read that another job would go on changing
        with _checkpoint_section():
            overruled = overruled_resume(script_at, os.environ)
            if overruled is not None and _rank() == 0:
                log.warning("the script resumes from %r, so --resume %s has no effect", script_at, overruled)
            asked, launches = _as_on_rank_zero((resume_from(script_at, os.environ), restarted_launches(os.environ)))
            is_from_command_line = script_at == "auto" and asked != "auto"
            templates = {
                name: each for name, of in self._collection.adapters.items() if (each := of.template()) is not None
            }
            resumed = self.store.resume(templates, asked, launches=launches if is_from_command_line else ())
            if resumed is None:
                return None
            found, loaded = resumed
            self._load(loaded, partial=partial)
        if _rank() == 0:
            facts = loaded.manifest.facts
            log.info(
                "resumed from %s: iteration %d, %s epochs completed, saved by %d ranks",
                *(found.name, loaded.manifest.step, facts.get("epoch"), loaded.manifest.world_size),
            )
        return loaded

    def save(self, engine: Engine, *, wait: bool = False) -> None:
        """Save now, on every rank at the same point, between accumulation groups.

        Args:
            wait: return when it is committed.
        """
        with _checkpoint_section():
            self._save(engine)
            if wait:
                self.store.wait()

    def close(self) -> None:
        """Wait for the save under way."""
        self.store.close()

    # Saving

    def _save(self, engine: Engine, *, is_run_over: bool = False) -> None:
        if not self._collection.has_looked:
            self._collection.refresh(self._engines or ([] if self._collection.given else [engine]))
        self._collection.end_watch()
        engine_state = engine.state_dict()
        step = engine_state["iteration"]
        facts = {
            "epoch": position_from(engine_state, ()).epochs_completed,
            "iteration": step,
            "stop_reason": engine.state.stop_reason,
            "seed": _seed(),
            "launches": self._launches,
            "collected": sorted(self._collection.found),
            **self.facts,
        }
        states = collect_states(self._collection.adapters)
        metrics, failure = self._current_metrics(engine)
        is_rated = self.metrics is not None or is_run_over or not engine.extension.epoch_is_open
        # What is not rated is kept beside the generators, for state.metrics of the resumed run.
        pending = self.store.save(
            step,
            states.common,
            own_state(states.per_rank, metrics),
            metrics if is_rated else None,
            facts,
            refusal=states.failure or failure,
            distrust=partial(_failure_of, weakref.ref(engine)),
        )
        run = self._runs.get(engine)
        if run is not None:
            # Also where it was left out: the next is due after a whole interval, not at once.
            run.schedule.saved(engine.state.iteration)
            if not pending.skipped:
                run.saved_at, run.lacks_rating = _place(engine_state), bool(metrics) and not is_rated

    def _current_metrics(self, engine: Engine) -> tuple[dict[str, float], str | None]:
        """The numbers among the metrics, or why they cannot be had."""
        try:
            given = engine.state.metrics if self.metrics is None else self.metrics(engine)
            return {name: float(value) for name, value in given.items() if is_one_number(value)}, None
        except Exception as error:  # a user's function; a save that fails does not stop training
            return {}, f"the metrics cannot be had: {type(error).__name__}: {error}"

    def _claim(self) -> None:
        try:
            with _checkpoint_section():
                self.store.claim()
        except FolderInUseError:
            raise
        except CheckpointError as error:  # each save tries it again
            if _rank() == 0:
                log.error("nothing can be saved in %s as it is now: %s", self.store.folder, error)

    # Handlers of an attached engine

    def _start(self, engine: Engine) -> None:
        self._collection.note_start(self._engines)
        self._claim()
        # Added when the run begins, and so called after all handlers that were added before it.
        before = self._runs.get(engine)
        for handle in before.handles if before is not None else ():
            handle.remove()
        handles = [
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._after_iteration),
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch),
            engine.add_event_handler(Events.TERMINATE | Events.COMPLETED, self._at_end),
            engine.add_event_handler(Events.EXCEPTION_RAISED, self._at_exception),
        ]
        schedule = SaveSchedule(self._times, engine.coordinator, engine.state.iteration)
        self._runs[engine] = _RunSaves(schedule, handles, None if before is None else before.saved_at)
        if self._resumption is not None:
            self._resumption.restore_generators()
            if not self._resumption.inside_epoch:
                self._resumption = None

    def _before_first_batch(self, engine: Engine) -> None:
        if self._resumption is not None and engine in self._runs:
            self._resumption.restore_generators()
            self._end_resumption()

    def _after_iteration(self, engine: Engine) -> None:
        state, schedule = engine.state, self._runs[engine].schedule
        if state.outcome == "failed" or not state.group_end or not schedule.iteration_is_due(state.iteration):
            return
        # At an epoch's end the handlers of EPOCH_COMPLETED are still to come: it is saved after them.
        if state.iteration < engine.extension.epoch_ends_at:
            self.save(engine)

    def _after_epoch(self, engine: Engine) -> None:
        is_due = self._runs[engine].schedule.epoch_is_due(engine.state.epoch, engine.state.iteration)
        if is_due and engine.state.outcome != "failed":
            self.save(engine)

    def _at_end(self, engine: Engine) -> None:
        self._collection.end_watch()
        with _checkpoint_section():
            committed = self.store.wait()  # before the last save, so that it is never left out as one too many
        if engine.state.outcome == "failed":
            if _rank() == 0 and engine.last_event_name == Events.TERMINATE:
                log.warning("not saved, since the run has failed: %s", engine.state.stop_reason)
            return
        is_run_over = engine.state.outcome != "left"
        run, place = self._runs[engine], _place(engine.state_dict())
        # The last save counts only if it was committed, and of this very place.
        is_saved = committed and run.saved_at == place
        if is_saved and not (is_run_over and run.lacks_rating):
            return
        # COMPLETED comes behind TERMINATE, and what could not be saved then is not tried again so soon.
        if run.ended_at != place:
            run.ended_at = place
            with _checkpoint_section():
                self._save(engine, is_run_over=is_run_over)
                committed = self.store.wait()
            if not committed and not is_saved:
                self._leave_unsaved(engine)

    def _leave_unsaved(self, engine: Engine) -> None:
        """Have the run raise where its end is lost: a preempted one would be started again for ever."""
        unsaved = self.store.unsaved
        if isinstance(engine.extension.leaving, Preempted):
            unsaved = CheckpointError(
                f"the run was preempted at iteration {engine.state.iteration} and that place was not saved: "
                f"{self.store.last_failure}. It ends as failed and not as preempted, since starting it again would not "
                "help before that is put right"
            )
        if unsaved is not None:
            engine.extension.leave_with(unsaved)

    def _at_exception(self, engine: Engine) -> None:
        self._collection.end_watch()
        # The engine has reported the exception before it fires this event, so nobody learns of it later for the wait.
        with _checkpoint_section(), suppress(CheckpointError):  # the log has it
            self.store.wait(AT_EXCEPTION_S)

    # Loading

    def _load(self, loaded: Loaded, *, partial: bool) -> None:
        loaded = without_twins(loaded)
        per_rank = [each.get("objects", {}) if isinstance(each, Mapping) else {} for each in loaded.per_rank]
        # An object may have a state in common, one of each rank, or both.
        known = loaded.state.keys() | (per_rank[0].keys() if per_rank else set())
        self._collection.check_holds(known, "collected" in loaded.manifest.facts, partial=partial)
        rank, epoch = current_data_ranks().rank, 0
        for name, adapter in self._collection.adapters.items():
            if name in known:
                adapter.load(loaded.state.get(name), [each.get(name) for each in per_rank], rank)
        metrics = saved_metrics(loaded, rank)
        engines = [each for each in self.objects.values() if isinstance(each, Engine)]
        for engine in engines:
            epoch = max(epoch, engine.state.epoch)
            # What the engine has under such a name already is not replaced.
            engine.state.metrics = {**metrics, **engine.state.metrics}
        self._end_resumption()
        self._resumption = Resumption(
            generators_restorer(loaded, rank, epoch),
            any(each.state.iteration > each.extension.epoch_began_at for each in engines),
        )
        if self._resumption.inside_epoch:
            # Whichever comes first, as the loop takes a batch, or finds that the data has none left.
            first = Events.GET_BATCH_STARTED | Events.ITERATION_STARTED | Events.EPOCH_COMPLETED
            self._resumption.handles = [
                engine.add_event_handler(first, self._before_first_batch) for engine in self._engines
            ]

    def _end_resumption(self) -> None:
        if self._resumption is not None:
            self._resumption.end()
        self._resumption = None


def _place(engine_state: Mapping[str, Any]) -> tuple[int, int, str | None]:
    """What tells whether a save would say anything new: iteration, epochs completed, and why the run has finished."""
    return engine_state["iteration"], position_from(engine_state, ()).epochs_completed, engine_state.get("finished")


def _failure_of(reference: weakref.ref[Engine]) -> str | None:
    """Why the run is of no use, as far as this rank knows; asked from the thread that writes."""
    engine = reference()  # which no save keeps alive
    return None if engine is None else engine.extension.failing


# The open World. Without one a checkpoint is of a single process.


def _rank() -> int:
    world = World.current()
    return 0 if world is None else world.rank


def _seed() -> int | None:
    world = World.current()
    return None if world is None else world.seed


def _as_on_rank_zero(value: T) -> T:
    """Rank 0's value, on every rank."""
    world = World.current()
    return value if world is None else world.gather_objects(value)[0]


def _checkpoint_section() -> AbstractContextManager[None]:
    """Tells the watchdog that this is a save or a load, which may last longer than a handler."""
    world = World.current()
    return nullcontext() if world is None else world.section("checkpoint")
