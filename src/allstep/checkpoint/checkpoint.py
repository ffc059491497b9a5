"""`Checkpoint`: saves everything that a run needs to go on, and brings it back.

Contract: every rank makes one with the same objects and attaches it to the engine that trains; `resume`, before the
run, finds the newest whole checkpoint, or the one it is told to, and loads it into the objects. During the run it saves
on the boundaries of accumulation groups only, after all other handlers of the same event: when one is due, when the run
is terminated, preemption included, and at its end. A run that was terminated as failed is not saved. What decides that
one is due is the same on every rank. Saving copies the state and goes on training; the store writes in the background.
An exception saves nothing, but a save under way is given a moment to end before the exception goes on: other ranks,
which are waiting for this one somewhere, still take part in it.

The random generators are put back last, when the resumed run begins, so that what is done between `resume` and the run
does not count; inside an epoch they are put back once more when its first batch is about to be taken, so that nothing
that begins a pass counts twice.

What a `Checkpoint` asks of the World that is open, if any: without one it is alone.

Contract: called from the main thread; `as_rank_0_says` on every rank at the same point.

The numbers that a checkpoint is rated by, out of an engine's metrics, and back.

Contract: pure functions, asked by `Checkpoint`. Metrics are numbers of any library; everything else is left out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from allstep.checkpoint import rng
from allstep.checkpoint.catalog import Verify
from allstep.checkpoint.objects import Kept, collect, kept_objects
from allstep.checkpoint.schedule import Every, Schedule, asked_for, launches_of, overruled, read_every, restarts_of
from allstep.checkpoint.selection import Found, KeepBest
from allstep.checkpoint.store import Busy, Loaded, Store
from allstep.engine import Engine, Events
from allstep.engine.registry import RemovableEventHandle
from allstep.errors import CheckpointError
from allstep.world import World

log = logging.getLogger("allstep.checkpoint")

_AT_EXCEPTION_S = 5.0
_OWN_FACTS = frozenset({"epoch", "iteration", "stop_reason", "seed", "launches"})


@dataclass(slots=True)
class _Run:
    """The latest run of an attached engine: when a save is due, and where the last one that was begun was taken."""

    schedule: Schedule
    handles: list[RemovableEventHandle]
    saved_at: tuple[int, int, str | None] | None = None
    lacks_rating: bool = False


class Checkpoint:
    """Saves objects to a folder and resumes from it.

    Args:
        folder: a path or an address that fsspec knows, which all ranks reach; or a `Store`.
        objects: what to save, by name: modules, optimizers, schedulers, scalers, metrics, engines, generators, and
            whatever else has `state_dict` and `load_state_dict`. `PerRank(object)` says that ranks differ in it.
        every: when to save besides the run's end: iterations as an int, a timedelta, a text such as "epoch" or
            "10 minutes", or several of these in a tuple.
        keep_last: how many of the newest checkpoints to keep; None keeps all.
        keep_best: how many of the best to keep besides: (count, name of a metric, "max" or "min").
        metrics: `engine -> mapping`, numbers to rate each checkpoint by. By default those in `engine.state.metrics`, at
            an epoch's end and at the end of a run that was not broken off; a save inside an epoch, where they are of
            the epoch before, is not rated.
        facts: what else the manifest should say, such as the run's configuration; as JSON takes it. It says epoch,
            iteration, stop_reason, seed and launches by itself.
        verify, strict, busy: see `Store`.

    Raises:
        CheckpointError: an object has no state, the folder cannot be used, or a fact has a name that is taken.
        ValueError: `every` cannot be meant.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | Store,
        objects: Mapping[str, Any],
        *,
        every: Every | Sequence[Every] | None = "epoch",
        keep_last: int | None = 3,
        keep_best: KeepBest | None = None,
        metrics: Callable[[Engine], Mapping[str, Any]] | None = None,
        facts: Mapping[str, Any] | None = None,
        verify: Verify = "full",
        strict: bool = False,
        busy: Busy = "wait",
    ) -> None:
        if taken := sorted(_OWN_FACTS & dict(facts or {}).keys()):
            raise CheckpointError(
                f"facts has {', '.join(taken)}, which the checkpoint says of itself and resumes by; give your own "
                "another name, such as config"
            )
        self._times = read_every(every)
        self.objects = dict(objects)
        self._engines: list[Engine] = []
        self._kept: dict[str, Kept] = kept_objects(self.objects)
        self.metrics = metrics
        self.facts = dict(facts or {})
        if isinstance(folder, Store):
            self.store = folder
        else:
            self.store = Store(
                os.fspath(folder), keep_last=keep_last, keep_best=keep_best, verify=verify, strict=strict, busy=busy
            )
        self._runs: dict[Engine, _Run] = {}
        self._inside: list[RemovableEventHandle] = []
        self._generators: Callable[[], None] | None = None
        self._resumed_inside = False
        self._has_loaded_engines = False

    def attach(self, engine: Engine) -> Checkpoint:
        """Save during the runs of `engine`; returns self.

        Raises:
            CheckpointError: `resume` has loaded engines already, without knowing which of them train.
        """
        if self._has_loaded_engines:
            raise CheckpointError(
                "attach the checkpoint before resume(): engines are loaded as what they are for, the ones that it is "
                "attached to as those that train, others as evaluators that begin anew"
            )
        self._engines.append(engine)
        self._kept = kept_objects(self.objects, self._engines)
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
            CheckpointError: the path that was asked for has none, or objects are missing in it, on every rank.
        """
        with section():
            templates = {name: each for name, kept in self._kept.items() if (each := kept.template()) is not None}
            resumed = self.store.resume(templates, lambda: self._find(os.fspath(at)))
            if resumed is None:
                return None
            found, loaded = resumed
            self._load(loaded, partial=partial)
        if current_rank() == 0:
            facts = loaded.manifest.facts
            log.warning(
                "resumed from %s: iteration %d, epoch %s, saved by %d ranks",
                *(found.name, loaded.manifest.step, facts.get("epoch"), loaded.manifest.world_size),
            )
        return loaded

    def _find(self, at: str) -> Found | None:
        """The checkpoint that rank 0 is told to go on from."""
        ignored = overruled(at, os.environ)
        if ignored is not None and current_rank() == 0:
            log.warning("the script resumes from %r, so --resume %s has no effect", at, ignored)
        chosen, restarts = as_rank_0_says((asked_for(at, os.environ), restarts_of(os.environ)))
        if chosen != "auto" and at == "auto" and restarts:
            found = self.store.choose("auto")
            if found is not None and not set(restarts).isdisjoint(found.manifest.facts.get("launches", ())):
                return found
        return None if chosen == "none" else self.store.choose(chosen)

    def save(self, engine: Engine, *, wait: bool = False) -> None:
        """Save now, on every rank at the same point, between accumulation groups.

        Args:
            wait: return when it is committed.
        """
        with section():
            self._save(engine)
            if wait:
                self.store.wait()

    def _save(self, engine: Engine, *, is_run_over: bool = False) -> None:
        place = engine.state_dict()
        step = place["iteration"]
        facts = {
            "epoch": place["epochs_completed"],
            "iteration": step,
            "stop_reason": engine.state.stop_reason,
            "seed": current_seed(),
            "launches": launches_of(os.environ),
            **self.facts,
        }
        found = collect(self._kept)
        metrics, failure = self._metrics(engine)
        is_rated = self.metrics is not None or is_run_over or not engine.extension.epoch_is_open
        own = {"objects": found.of_rank, "generators": rng.capture(), "metrics": metrics}
        pending = self.store.save(
            step, found.common, own, metrics if is_rated else None, facts, refused=found.failure or failure
        )
        run = self._runs.get(engine)
        if run is not None:
            run.schedule.saved(engine.state.iteration)
            if not pending.skipped:
                run.saved_at, run.lacks_rating = _where(place), bool(metrics) and not is_rated

    def close(self) -> None:
        """Wait for the save under way."""
        self.store.close()

    def _load(self, loaded: Loaded, *, partial: bool) -> None:
        mine = [each.get("objects", {}) if isinstance(each, Mapping) else {} for each in loaded.per_rank]
        known = loaded.state.keys() | (mine[0].keys() if mine else set())
        missing = sorted(self._kept.keys() - known)
        if missing and not partial:
            raise CheckpointError(
                f"the checkpoint lacks {', '.join(missing)}; it has {', '.join(sorted(known))}. Give what it was saved "
                "with, or resume(partial=True) to leave them as they are"
            )
        rank, epoch = current_rank(), 0
        metrics = metrics_of(loaded, rank)
        for name, kept in self._kept.items():
            if name in known:
                kept.load(loaded.state.get(name), [each.get(name) for each in mine], rank)
        for name, value in self.objects.items():
            if isinstance(value, Engine):
                self._has_loaded_engines |= name in known
                epoch = max(epoch, value.state.epoch)
                value.state.metrics = {**metrics, **value.state.metrics}
        self._resumed_inside = any(
            isinstance(value, Engine) and value.state.iteration > value.extension.epoch_began_at
            for value in self.objects.values()
        )
        self._generators = _generators(loaded, rank, epoch)
        self._forget_inside()
        if self._resumed_inside:
            first = Events.GET_BATCH_STARTED | Events.ITERATION_STARTED | Events.EPOCH_COMPLETED
            self._inside = [engine.add_event_handler(first, self._go_on_inside) for engine in self._engines]

    def _forget_inside(self) -> None:
        for handle in self._inside:
            handle.remove()
        self._inside = []

    def _metrics(self, engine: Engine) -> tuple[dict[str, float], str | None]:
        """The numbers among the metrics, or why they cannot be had."""
        try:
            given = engine.state.metrics if self.metrics is None else self.metrics(engine)
            return numbers(given), None
        except Exception as error:
            return {}, f"the metrics cannot be had: {type(error).__name__}: {error}"

    def _start(self, engine: Engine) -> None:
        """Come after all handlers that were added before the run, and go on with the generators."""
        before = self._runs.get(engine)
        for handle in before.handles if before is not None else ():
            handle.remove()
        handles = [
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._after_iteration),
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch),
            engine.add_event_handler(Events.TERMINATE | Events.COMPLETED, self._at_end),
            engine.add_event_handler(Events.EXCEPTION_RAISED, self._at_exception),
        ]
        schedule = Schedule(self._times, engine.coordinator, engine.state.iteration)
        self._runs[engine] = _Run(schedule, handles, None if before is None else before.saved_at)
        if self._generators is not None:
            self._generators()
        if not self._resumed_inside:
            self._generators = None

    def _go_on_inside(self, engine: Engine) -> None:
        if self._generators is not None and engine in self._runs:
            self._generators()
            self._generators, self._resumed_inside = None, False
            self._forget_inside()

    def _after_iteration(self, engine: Engine) -> None:
        state, schedule = engine.state, self._runs[engine].schedule
        if state.outcome == "failed" or not state.group_end or not schedule.iteration_is_due(state.iteration):
            return
        # At an epoch's end the handlers of EPOCH_COMPLETED are still to come: it is saved after them.
        if state.epoch_length is None or state.iteration - engine.extension.epoch_began_at < state.epoch_length:
            self.save(engine)

    def _after_epoch(self, engine: Engine) -> None:
        is_due = self._runs[engine].schedule.epoch_is_due(engine.state.epoch, engine.state.iteration)
        if is_due and engine.state.outcome != "failed":
            self.save(engine)

    def _at_exception(self, engine: Engine) -> None:
        # The engine has told the service of the exception before it fires this event, so nobody learns of it later.
        with section(), suppress(CheckpointError):  # which the log has told
            self.store.wait(_AT_EXCEPTION_S)

    def _at_end(self, engine: Engine) -> None:
        with section():
            committed = self.store.wait()  # before the last save, which is never left out
        if engine.state.outcome == "failed":
            if current_rank() == 0 and engine.last_event_name == Events.TERMINATE:
                log.warning("not saved, since the run has failed: %s", engine.state.stop_reason)
            return
        is_run_over = engine.state.outcome != "left"
        run = self._runs[engine]
        is_saved = committed and run.saved_at == _where(engine.state_dict())
        if not is_saved or (is_run_over and run.lacks_rating):
            with section():
                self._save(engine, is_run_over=is_run_over)
                self.store.wait()


def _where(place: Mapping[str, Any]) -> tuple[int, int, str | None]:
    """What tells whether a save would say anything new."""
    return place["iteration"], place["epochs_completed"], place.get("finished")


def _generators(loaded: Loaded, rank: int, epoch: int) -> Callable[[], None]:
    own = loaded.per_rank[rank] if rank < len(loaded.per_rank) else None
    if isinstance(own, Mapping) and "generators" in own:
        return lambda: rng.restore(own["generators"])
    return lambda: rng.seed_for_rank(int(loaded.manifest.facts.get("seed") or 0), epoch, rank)


T = TypeVar("T")


def current_rank() -> int:
    """This process among all."""
    world = World.current()
    return 0 if world is None else world.rank


def current_seed() -> int | None:
    """What the World was seeded with."""
    world = World.current()
    return None if world is None else world.seed


def as_rank_0_says(value: T) -> T:
    """Rank 0's value, on every rank."""
    world = World.current()
    return value if world is None else world.gather_objects(value)[0]


def section() -> AbstractContextManager[None]:
    """For the watchdog: a save may last longer than a handler."""
    world = World.current()
    return nullcontext() if world is None else world.section("checkpoint")


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among metrics."""
    return {name: float(value) for name, value in metrics.items() if _is_number(value)}


def metrics_of(loaded: Loaded, rank: int) -> dict[str, float]:
    """What a rank had measured at a save, be it of that place or of the epoch before; rank 0's for a rank more."""
    states = loaded.per_rank
    own = states[rank if rank < len(states) else 0] if states else None
    before = dict(own.get("metrics", {})) if isinstance(own, Mapping) else {}
    return {**before, **loaded.manifest.metrics}


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) or (isinstance(value, np.generic | np.ndarray) and value.size == 1)
