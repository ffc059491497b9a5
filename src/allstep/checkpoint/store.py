"""`Store`: a folder of checkpoints that a run saves to and resumes from.

Contract: every rank makes one and calls the same methods at the same points, from its main thread. `save` returns when
this rank's part of the state is copied. The rest happens in a thread, over a process group of its own, with one save
under way at a time. A save that fails is reported on every rank and leaves the other checkpoints as they are; it stops
training only where the store is strict. A folder belongs to one run at a time: opening a store removes what earlier
attempts left unfinished.

A save is one `Save` record. The store makes it and puts the snapshot in; the thread of its `PendingSave` writes it
(`allstep.checkpoint.commit`). What a rank reads from a `PendingSave` after `wait` is the same on all ranks. Its thread
has ended when `wait` returns. Where the interpreter ends before, the thread is waited for, within bounds: one that
still runs then can abort the process.

A store knows nothing of engines, modules and random generators: it is given plain nested state, and gives it back.
"""

from __future__ import annotations

import atexit
import logging
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, get_args

import torch.distributed as dist

from allstep.checkpoint.catalog import Verify
from allstep.checkpoint.commit import Save, write_save
from allstep.checkpoint.manifest import CheckpointName, Manifest, next_order, read_name
from allstep.checkpoint.reading import CheckpointReader
from allstep.checkpoint.retention import KeepBest, Retention, remove_unfinished
from allstep.checkpoint.selection import Found, ask_rank_zero, choose, was_saved_by
from allstep.checkpoint.snapshot import SnapshotBuffer, take_snapshot
from allstep.checkpoint.storage import Storage, open_storage
from allstep.coordination import Alone, Coordinator, GroupCoordinator
from allstep.errors import ArgumentError, CheckpointError, DamagedCheckpointError

Busy = Literal["wait", "skip"]

log = logging.getLogger("allstep.checkpoint")

_AT_EXIT_S = 10.0


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


class PendingSave:
    """A save that was begun, or left out because another was under way."""

    def __init__(self, step: int, save: Save | None, *, strict: bool) -> None:
        """Made by `Store.save`.

        Args:
            step: the iteration after which it was taken.
            save: the record of the save; None where it was left out.
            strict: see `Store`.
        """
        self.step = step
        self._save = save
        self._strict = strict
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str | None:
        """Of the checkpoint's folder; None where the save was left out."""
        return None if self._save is None else str(self._save.name)

    @property
    def error(self) -> CheckpointError | None:
        """Why it failed, once it has."""
        return None if self._save is None else self._save.error

    @property
    def skipped(self) -> bool:
        """Whether it was left out."""
        return self._save is None

    def start(self, storage: Storage, coordinator: Coordinator, retention: Retention) -> None:
        """Write the save in a thread; the arguments are those of `write_save`."""
        # A daemon, so that a disk that hangs does not keep a process from ending for ever.
        self._thread = threading.Thread(
            target=self._write, args=(storage, coordinator, retention), daemon=True, name=f"allstep-{self.name}"
        )
        atexit.register(self._thread.join, _AT_EXIT_S)
        self._thread.start()

    def done(self) -> bool:
        """Whether it has ended here, well or not; other ranks may be a moment behind."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end and say whether the checkpoint is committed.

        Args:
            timeout: seconds after which it is left to go on, which counts as not committed; on this rank alone.

        Raises:
            CheckpointError: it failed, and the store is strict.
        """
        if self._thread is not None:
            self._thread.join(timeout)
            # Asked of the thread and not of the outcome, which is there a moment before the thread has ended.
            if self._thread.is_alive():
                return False
            atexit.unregister(self._thread.join)
            self._thread = None
        if self.error is not None and self._strict:
            raise self.error
        return self.error is None and not self.skipped

    def _write(self, storage: Storage, coordinator: Coordinator, retention: Retention) -> None:
        save = self._save
        assert save is not None
        try:
            write_save(save, storage, coordinator, retention)
        finally:
            if save.manifest is None and save.error is None:  # SystemExit and the like, which end the thread
                save.error = save.failure("its thread did not finish")


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
        patience: float = 30.0,
        timeout: float = 3600.0,
        storage: Storage | None = None,
    ) -> None:
        """Open a folder of checkpoints, on every rank.

        Args:
            folder: a path, or an address that fsspec knows. All ranks must reach it.
            coordinator: for what the main threads agree on; by default over a gloo group of its own.
            background: for the threads that write; nothing else may use it. By default the same.
            keep_last: how many of the newest checkpoints stay after a commit; None keeps all.
            keep_best: how many of the best stay besides: (count, name of a metric, "max" or "min").
            verify: before a checkpoint is used, compare every file's hash ("full") or its size ("size").
            strict: a failed save raises, in `PendingSave.wait`, the next `save`, or `wait`.
            busy: what `save` does while another is under way: wait for it, or leave the new one out.
            patience: seconds for which `choose` waits for files that some ranks do not see, or that cannot be read.
            timeout: seconds that ranks wait for each other in a save.
            storage: in place of `folder`'s own.

        Raises:
            ArgumentError: verify, busy, keep_last or keep_best has no such value.
            CheckpointError: rank 0 cannot read the folder; on every rank.
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
        self._next_order, self._token = ask_rank_zero(self._coordinator, self._clean_up)

    @property
    def folder(self) -> str:
        """Where the checkpoints are."""
        return self._storage.root

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        per_rank: Any = None,
        metrics: Mapping[str, float] | None = None,
        facts: Mapping[str, Any] | None = None,
        *,
        refusal: str | None = None,
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

        Raises:
            CheckpointError: the save before failed, and the store is strict.
        """
        if self._busy == "skip" and self._is_busy_anywhere():
            return PendingSave(step, None, strict=self._strict)
        self.wait()  # also for the memory: the snapshot before is written from the same buffer
        if metrics is not None:
            self._warn_unless_rated(metrics)
        name = CheckpointName(self._next_order, step)
        self._next_order += 1
        save = Save(
            name,
            name.temporary(self._token) if self._storage.has_rename else str(name),
            dict(metrics or {}),
            dict(facts or {}),
            refusal=refusal,
        )
        if save.refusal is None:
            try:
                rank, world_size = self._background.rank, self._background.world_size
                save.snapshot = take_snapshot(state, per_rank, self._buffer, rank, world_size)
            except Exception as error:  # the other ranks hear of it in the commit, and must not wait for this one
                save.refusal = f"{type(error).__name__}: {error}"
        self._last = PendingSave(step, save, strict=self._strict)
        self._last.start(self._storage, self._background, self._retention)
        return self._last

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the save under way, if there is one, and say whether the last one is committed.

        Args:
            timeout: seconds after which it is left to go on, which counts as not committed; on this rank alone.

        Raises:
            CheckpointError: it failed, and the store is strict. It is raised once.
        """
        if self._last is None:
            return True
        try:
            return self._last.wait(timeout)
        except CheckpointError:
            self._last = None  # so that it is raised once, and the next save goes on
            raise

    def close(self) -> None:
        """Wait for the save under way and let go of the memory."""
        try:
            self.wait()
        finally:
            self._buffer = SnapshotBuffer()

    def choose(self, at: str = "auto") -> Found | None:
        """The checkpoint to resume from, verified, the same on every rank.

        Args:
            at: "auto" for the newest here that is whole, or the path of one checkpoint, or of a folder of them.

        Returns:
            None with "auto" where there is none.

        Raises:
            CheckpointError: a path was given, and there is nothing there that can be used; on every rank.
        """
        if at == "auto":
            return choose(self._storage, self._coordinator, verify=self._verify, patience=self._patience)
        # The name tells one checkpoint from a folder of them; nothing is asked of the file system.
        parent, _, last = at.rstrip("/").rpartition("/")
        only = last if read_name(last) is not None else None
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

    def _clean_up(self) -> tuple[int, str]:
        """On rank 0: remove what is unfinished; the order of the first save, and a name for its temporary folders."""
        folders = self._storage.folders()  # before the removal: their orders are not used again
        for folder, problem in remove_unfinished(self._storage).items():
            if problem is None:
                log.warning("removed %s/%s, which an earlier attempt left unfinished", self._storage.root, folder)
            else:
                log.warning("%s/%s was left unfinished and cannot be removed: %s", self._storage.root, folder, problem)
        return next_order(folders), uuid.uuid4().hex[:8]

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
    # Of its own: a collective of training between two of a save's would be paired with the wrong one.
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    assert isinstance(group, dist.ProcessGroup)
    return GroupCoordinator(group)
