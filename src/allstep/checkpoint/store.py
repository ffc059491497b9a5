"""`Store`: a folder of checkpoints that a run saves to and resumes from.

Contract: every rank makes one and calls the same methods at the same points, from its main thread. `save` returns when
this rank's part of the state is copied. The rest happens in a thread, by messages of its own, with one save
under way at a time (`pending_save`). A save that fails is reported on every rank and leaves the other checkpoints as
they are; it stops training only where the store is strict.

A folder belongs to one job at a time (`owner`). `claim`, or the first `save`, makes this job its owner, and removes
what owners before it left unfinished. Looking, choosing and loading need no claim and change nothing but to quarantine
what is damaged. Where the folder has been taken over by another job, `save` and `wait` raise on every rank.

A save is one `Save` record. The store makes it and puts the snapshot in; a thread writes it (`commit`). Which saves it
comes from, its lineage, follows from what was loaded before the first save.

A World that is closed, and a script that ends, wait for the save under way first.

A store knows nothing of engines, modules and random generators: it is given plain nested state, and gives it back.
"""

from __future__ import annotations

import logging
import os
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

import torch.distributed as dist

from allstep.checkpoint.catalog import Verify, is_checkpoint
from allstep.checkpoint.commit import Save
from allstep.checkpoint.manifest import CheckpointName, Manifest, next_order
from allstep.checkpoint.owner import Ownership, claim_folder, claim_of_this_process
from allstep.checkpoint.pending_save import PendingSave
from allstep.checkpoint.reading import CheckpointReader
from allstep.checkpoint.retention import KeepBest, Lineage, Retention, remove_unfinished
from allstep.checkpoint.selection import Found, ask_rank_zero, asks_to_take_over, attempts_of, choose, was_saved_by
from allstep.checkpoint.snapshot import SnapshotBuffer, take_snapshot
from allstep.checkpoint.storage import Storage, in_words, open_storage
from allstep.coordination import Alone, Coordinator, GroupCoordinator
from allstep.errors import ArgumentError, CheckpointError, DamagedCheckpointError, FolderInUseError
from allstep.world import World, internals

Busy = Literal["wait", "skip"]

log = logging.getLogger("allstep.checkpoint")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was in a checkpoint.

    Attributes:
        state: the nested state of each name, as it was saved; tensors are on the CPU.
        per_rank: what each rank of the run that saved had for itself, in rank order.
        manifest: what the checkpoint says about itself.
    """

    state: dict[str, Any]
    per_rank: list[Any]
    manifest: Manifest


class Store:
    """A folder of checkpoints."""

    def __init__(
        self,
        folder: str,
        *,
        coordinator: Coordinator | None = None,
        background: Coordinator | None = None,
        keep_last: int | None = 3,
        keep_best: KeepBest | None = None,
        verify: Verify = "full",
        strict: bool = False,
        busy: Busy = "wait",
        take_over: bool = False,
        patience: float = 30.0,
        timeout: float = 3600.0,
        storage: Storage | None = None,
    ) -> None:
        """Open a folder of checkpoints, on every rank.

        Args:
            folder: a path, or an address that fsspec knows. All ranks must reach it.
            coordinator: for what the main threads agree on; by default messages over the World's gloo group.
            background: for the threads that write; nothing else may use it. By default messages of their own.
            keep_last: how many of the newest checkpoints stay after a commit; None keeps all.
            keep_best: how many of the best stay besides: (count, name of a metric, "max" or "min").
            verify: before a checkpoint is used, compare every file's hash ("full") or its size ("size").
            strict: a failed save raises, in `PendingSave.wait`, the next `save`, or `wait`.
            busy: what `save` does while another is under way: wait for it, or leave the new one out.
            take_over: claim the folder also from another job that is alive, which then saves no more; as
                `allstep run --take-over` says too.
            patience: seconds for which `choose` waits for files that some ranks do not see, or that cannot be read.
            timeout: seconds that ranks wait for each other in a save.
            storage: in place of `folder`'s own.

        Raises:
            ArgumentError: verify, busy, keep_last or keep_best has no such value.
        """
        if verify not in get_args(Verify) or busy not in get_args(Busy):
            raise ArgumentError(
                f'verify is {verify!r} and busy is {busy!r}; give "full" or "size", and "wait" or "skip"'
            )
        self._retention = Retention(keep_last, keep_best)
        self._storage = storage if storage is not None else open_storage(str(folder))
        self._coordinator = coordinator if coordinator is not None else _own_coordinator(timeout)
        self._background = background if background is not None else _own_coordinator(timeout)
        self._verify: Verify = verify
        self._strict = strict
        self._busy: Busy = busy
        self._patience = patience
        self._buffer = SnapshotBuffer()
        self._last: PendingSave | None = None
        self._has_warned = False
        self._take_over = take_over or asks_to_take_over(os.environ)
        self._is_claimed = False
        self._ownership: Ownership | None = None  # rank 0's
        self._next_order, self._token = 0, ""
        self._loaded: Found | None = None
        self._lineage: Lineage | None = None
        self._has_committed = False
        self._said_unsaved = False
        world = World.current()
        if world is not None:
            internals(world).before_close(weakref.WeakMethod(self._before_world_closes))

    @property
    def folder(self) -> str:
        """Where the checkpoints are."""
        return self._storage.root

    def claim(self) -> None:
        """Become the owner of the folder now, rather than at the first save; again is no more than once.

        Where it is held by another job that may be alive, this takes up to a minute.

        Raises:
            FolderInUseError: it belongs to another job that is alive; on every rank.
            CheckpointError: rank 0 cannot use the folder; on every rank.
        """
        if not self._is_claimed:
            self._next_order, self._token = ask_rank_zero(self._coordinator, self._claim)
            self._is_claimed = True

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        per_rank: Any = None,
        metrics: Mapping[str, float] | None = None,
        facts: Mapping[str, Any] | None = None,
        *,
        refusal: str | None = None,
        distrust: Callable[[], str | None] = lambda: None,
    ) -> PendingSave:
        """Copy the state and begin to write it.

        Args:
            step: the iteration after which it is taken, 0 or more, the same on all ranks.
            state: nested values by name: dicts, lists, tuples, numbers, strings, bytes, None, tensors, numpy arrays.
                DTensors are written by shards; every other tensor and value is the same on all ranks.
            per_rank: a nested value of this rank alone.
            metrics: numbers by name, for `keep_best` and for people; None where nothing was measured.
            facts: what else the manifest should say, as JSON takes it.
            refusal: why this rank has no state to save, which fails the save on every rank.
            distrust: why the run's state is of no use, as far as this rank knows when asked. What a rank distrusts
                now is not committed. Where one does before it is written, nothing is removed for it.

        Raises:
            FolderInUseError: the folder belongs to another job that is alive.
            FolderLostError: another job has taken the folder over.
            CheckpointError: the save before failed, and the store is strict.
        """
        try:
            self.claim()
        except FolderInUseError:
            raise
        except CheckpointError as error:  # a disk that cannot be written to now may be another time
            refusal = str(error)
        if self._busy == "skip" and self._is_busy_anywhere():
            return PendingSave(step, None, strict=self._strict)
        self.wait()  # also for the memory: the snapshot before is written from the same buffer
        if metrics is not None:
            self._warn_unless_rated(metrics)
        if self._lineage is None:
            self._lineage = self._lineage_of_loaded()
        name = CheckpointName(self._next_order, step)
        self._next_order += 1
        save = Save(
            name,
            name.temporary(self._token) if self._storage.has_rename else str(name),
            dict(metrics or {}),
            dict(facts or {}),
            self._lineage,
            distrust,
            distrust(),
            said_before=None if self._last is None else self._last.reason,
            refusal=refusal,
        )
        if save.refusal is None:
            try:
                rank, world_size = self._background.rank, self._background.world_size
                save.snapshot = take_snapshot(state, per_rank, self._buffer, rank, world_size)
            except Exception as error:  # the other ranks hear of it in the commit, and must not wait for this one
                save.refusal = f"{type(error).__name__}: {error}"
        self._last = PendingSave(step, save, strict=self._strict)
        self._last.start(self._storage, self._background, self._retention, self._ownership)
        return self._last

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the save under way, if there is one, and say whether the last one is committed.

        Args:
            timeout: seconds after which it is left to go on, which counts as not committed; on this rank alone.

        Raises:
            CheckpointError: it failed, and the store is strict. It is raised once.
            FolderLostError: another job has taken the folder over.
        """
        last = self._last
        if last is None:
            return True
        try:
            return last.wait(timeout)
        except CheckpointError:
            self._last = None  # so that it is raised once, and the next save goes on
            raise
        finally:
            self._note_end(last)

    @property
    def unsaved(self) -> CheckpointError | None:
        """Set when saves were begun and all have failed, so that nothing at all of this run was saved; given once."""
        last = self._last
        if last is None or self._has_committed or self._said_unsaved or last.error is None:
            return None
        self._said_unsaved = True
        return CheckpointError(f"nothing of this run was saved in {self.folder}: {last.reason}")

    @property
    def last_failure(self) -> str | None:
        """Why the last save failed, where it did."""
        return None if self._last is None else self._last.reason

    def close(self) -> None:
        """Wait for the save under way, give the folder back and let go of the memory.

        Raises:
            CheckpointError: the last save failed and the store is strict, or nothing at all was saved.
        """
        try:
            self.wait()
            if (unsaved := self.unsaved) is not None:
                raise unsaved
        finally:
            self._buffer = SnapshotBuffer()
            self._is_claimed = False
            if self._ownership is not None:
                self._ownership.release()
                self._ownership = None

    def choose(self, at: str = "auto") -> Found | None:
        """The checkpoint to resume from, verified, the same on every rank.

        Args:
            at: "auto" for the newest here that is whole, or the path of one checkpoint, or of a folder of them.

        Returns:
            None with "auto" where there is none.

        Raises:
            CheckpointError: a path was given, and there is nothing there that can be used; or one that is newer than
                the newest whole one cannot be read, be it whole or not. On every rank.
        """
        if at == "auto":
            return choose(self._storage, self._coordinator, verify=self._verify, patience=self._patience)
        parent, _, last = at.rstrip("/").rpartition("/")
        is_one = ask_rank_zero(self._coordinator, lambda: is_checkpoint(open_storage(parent or "."), last))
        only = last if is_one else None
        storage = open_storage((parent or ".") if only else at)
        found = choose(storage, self._coordinator, verify=self._verify, patience=self._patience, only=only)
        if found is None:
            raise CheckpointError(f"there is no checkpoint to resume from at {at}")
        return found

    def load(self, found: Found, template: Mapping[str, Any] | None = None) -> Loaded:
        """Read a checkpoint that was chosen, at any world size.

        Args:
            found: what `choose` gave.
            template: state by name, as for `save`, where it has DTensors: they are filled in place and are what
                `Loaded.state` holds at their keys.

        Raises:
            CheckpointError: a rank could not read it; on every rank.
        """
        loaded: Loaded | None = None
        failure: tuple[bool, str] | None = None
        try:
            storage = self._storage if found.root == self._storage.root else open_storage(found.root)
            with CheckpointReader(storage, found.name, found.manifest) as reader:
                loaded = Loaded(reader.read_state(template or {}), reader.read_per_rank(), found.manifest)
        except Exception as error:
            failure = isinstance(error, DamagedCheckpointError), f"{type(error).__name__}: {error}"
        failures = self._coordinator.gather(failure)
        for rank, each in enumerate(failures):
            if each is not None:
                # Damage that one rank met is damage for all, so that all take the same way from here.
                kind = DamagedCheckpointError if any(other and other[0] for other in failures) else CheckpointError
                raise kind(f"checkpoint {found.root}/{found.name} was not loaded: rank {rank}: {each[1]}")
        assert loaded is not None
        self._loaded = found
        return loaded

    def resume(
        self, template: Mapping[str, Any] | None = None, at: str = "auto", *, launches: Sequence[str] = ()
    ) -> tuple[Found, Loaded] | None:
        """Choose a checkpoint and load it.

        Where sizes alone were verified and the contents prove to be damaged, this store verifies everything from then
        on, and the checkpoint before is used.

        Args:
            template: see `load`.
            at: see `choose`; or "none" for no checkpoint.
            launches: names of launches (`selection.launches_of`). What one of them saved here goes before `at`.

        Returns:
            None where there is nothing to resume from.

        Raises:
            CheckpointError: as in `choose` and `load`.
        """
        found = self._find(at, launches)
        if found is None:
            return None
        try:
            return found, self.load(found, template)
        except DamagedCheckpointError:
            if self._verify == "full":
                raise
            self._verify = "full"
        found = self._find(at, launches)
        return None if found is None else (found, self.load(found, template))

    def _find(self, at: str, launches: Sequence[str]) -> Found | None:
        if launches:
            found = self.choose("auto")
            if found is not None and was_saved_by(found.manifest, launches):
                return found
        return None if at == "none" else self.choose(at)

    def _claim(self) -> tuple[int, str]:
        """On rank 0: own the folder and sweep it; the order of the first save, and a name for temporary folders."""
        mine = claim_of_this_process(attempts_of(os.environ))
        try:
            self._ownership = claim_folder(self._storage, mine, take_over=self._take_over)
        except OSError as error:
            raise CheckpointError(in_words(error, self._storage.root)) from error
        folders = self._storage.folders()  # before the removal: their orders are not used again
        for folder, problem in remove_unfinished(self._storage).items():
            if problem is None:
                log.warning("removed %s/%s, which an earlier attempt left unfinished", self._storage.root, folder)
            else:
                log.warning("%s/%s was left unfinished and cannot be removed: %s", self._storage.root, folder, problem)
        return next_order(folders), uuid.uuid4().hex[:8]

    def _lineage_of_loaded(self) -> Lineage:
        found = self._loaded
        if found is None:
            return Lineage.new()
        return Lineage.of(found.root, found.name, found.manifest, self._storage.root, self._next_order)

    def _note_end(self, last: PendingSave) -> None:
        """Take note of what became of the last save, once it has ended."""
        if last.done() and last.committed and self._lineage is not None:
            self._has_committed = True
            self._lineage = replace(self._lineage, parent=last.name)

    def _before_world_closes(self, failed: bool) -> None:
        """Ranks leave the World when all of them have written."""
        last = self._last
        if last is None:
            return
        last.before_world_closes(failed)
        self._note_end(last)
        if not failed and (unsaved := self.unsaved) is not None:
            raise unsaved

    def _is_busy_anywhere(self) -> bool:
        # One rank's thread may have ended while another's has not; all must leave the save out, or none.
        busy = self._last is not None and not self._last.done()
        return self._coordinator.vote([int(busy)]).wait()[0] > 0

    def _warn_unless_rated(self, metrics: Mapping[str, float]) -> None:
        """Warn once when the metric that the best are kept by is not among those that are saved."""
        best = self._retention.keep_best
        if best is None or best[1] in metrics or self._has_warned or self._coordinator.rank:
            return
        self._has_warned = True
        log.warning(
            "metric %r is not among those that are saved (%s): checkpoints without it are never among the best",
            best[1],
            ", ".join(sorted(metrics)) or "none",
        )


def _own_coordinator(timeout: float) -> Coordinator:
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Alone()
    world = World.current()
    shared = None if world is None else internals(world).coordinator
    if not isinstance(shared, GroupCoordinator):  # a script that opened its process group itself
        shared = GroupCoordinator(cache(_gloo_group), dist.get_rank(), dist.get_world_size())
    # By messages: a save's thread must not come between the collectives of training, and may wait for longer.
    return shared.by_messages(timeout)


def _gloo_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", group_desc="allstep checkpoints")
    assert isinstance(group, dist.ProcessGroup)
    return group
