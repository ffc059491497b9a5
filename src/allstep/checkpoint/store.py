"""`Store`: a folder of checkpoints that a run saves to and resumes from.

Contract: every rank makes one and calls the same methods at the same points, from its main thread. `save` returns when
this rank's part of the state is copied; the rest happens in a thread, over a process group of its own, with one save
under way at a time. A save that fails is reported on every rank and leaves the other checkpoints as they are; it stops
training only where the store is strict. A folder belongs to one run at a time: opening a store removes what earlier
attempts left unfinished.

It knows nothing of engines, modules and random generators: it is handed plain nested state, and gives it back.

A save under way: what `Store.save` gives back.

Contract: made by `Store` on every rank, which hands it what writes; that runs in a thread of its own and says why it
failed. What a rank reads from it after `wait` is the same on all ranks. The thread has ended when `wait` returns, and
is waited for, within bounds, when the interpreter ends before: one that still runs then can abort the process.
"""

from __future__ import annotations

import atexit
import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, get_args

import torch.distributed as dist

from allstep.checkpoint.catalog import Verify, sweep
from allstep.checkpoint.commit import Order, Writer
from allstep.checkpoint.manifest import Manifest, Name, next_order, read_name
from allstep.checkpoint.reading import Reader
from allstep.checkpoint.selection import Found, KeepBest, Retention, choose, from_first
from allstep.checkpoint.snapshot import Snapshot, Stager, take_snapshot
from allstep.checkpoint.storage import Storage, open_storage
from allstep.coordination import Alone, Coordinator, GroupCoordinator
from allstep.errors import CheckpointError, DamagedCheckpointError

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
            strict: a failed save raises, in `Pending.wait`, the next `save`, or `wait`.
            busy: what `save` does while another is under way: wait for it, or leave the new one out.
            patience: seconds for which `choose` waits for files that some ranks do not see, or that cannot be read.
            timeout: seconds that ranks wait for each other in a save.
            storage: in place of `folder`'s own.

        Raises:
            CheckpointError: an argument is wrong, or rank 0 cannot read the folder; on every rank.
        """
        if verify not in get_args(Verify) or busy not in get_args(Busy):
            raise CheckpointError(
                f'verify is {verify!r} and busy is {busy!r}; give "full" or "size", and "wait" or "skip"'
            )
        retention = Retention(keep_last, keep_best)
        self._storage = storage if storage is not None else open_storage(str(folder))
        self._coordinator = coordinator if coordinator is not None else _own_coordinator(timeout)
        self._background = background if background is not None else _own_coordinator(timeout)
        self._verify: Verify = verify
        self._strict = strict
        self._busy: Busy = busy
        self._patience = patience
        self._stager = Stager()
        self._last: Pending | None = None
        self._writer = Writer(self._storage, self._background, retention)
        self._next, self._token = from_first(self._coordinator, self._begin)

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
        refused: str | None = None,
    ) -> Pending:
        """Copy the state and begin to write it.

        Args:
            step: the iteration after which it is taken, 0 or more, the same on all ranks.
            state: nested values by name: dicts, lists, tuples, numbers, strings, bytes, None, tensors, numpy arrays.
                DTensors are written by shards; every other tensor and value is the same on all ranks.
            per_rank: a nested value of this rank alone.
            metrics: numbers by name, for `keep_best` and for people; None where nothing was measured.
            facts: what else the manifest should say, as JSON takes it.
            refused: why this rank has no state to save, which fails the save on every rank.

        Raises:
            CheckpointError: the save before failed, and the store is strict.
        """
        if self._busy == "skip" and self._is_busy_anywhere():
            return Pending(step, None, strict=self._strict)
        self.wait()
        if metrics is not None:
            self._writer.check_metric(metrics)
        name = Name(self._next, step)
        self._next += 1
        snapshot = None
        if refused is None:
            snapshot, refused = self._take_snapshot(state, per_rank)
        folder = name.temporary(self._token) if self._storage.has_rename else str(name)
        order = Order(name, folder, snapshot, refused, dict(metrics or {}), dict(facts or {}))
        self._last = Pending(step, name, strict=self._strict)
        self._last.begin(partial(self._writer.write, order))
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
            self._last = None
            raise

    def close(self) -> None:
        """Wait for the save under way and let go of the memory."""
        try:
            self.wait()
        finally:
            self._stager = Stager()

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
            loaded = self._read(found, template or {})
        except Exception as error:
            failure = isinstance(error, DamagedCheckpointError), f"{type(error).__name__}: {error}"
        failures = self._coordinator.gather(failure)
        for rank, each in enumerate(failures):
            if each is not None:
                kind = DamagedCheckpointError if any(other and other[0] for other in failures) else CheckpointError
                raise kind(f"checkpoint {found.root}/{found.name} was not loaded: rank {rank}: {each[1]}")
        assert loaded is not None
        return loaded

    def resume(
        self, template: Mapping[str, Any] | None = None, find: Callable[[], Found | None] | None = None
    ) -> tuple[Found, Loaded] | None:
        """Choose a checkpoint and load it.

        Where sizes alone were verified and the contents prove to be damaged, this store verifies everything from then
        on, and the checkpoint before is used.

        Args:
            template: see `load`.
            find: calls `choose` on every rank; by default just that.

        Raises:
            CheckpointError: as in `choose` and `load`.
        """
        find = find or self.choose
        found = find()
        if found is None:
            return None
        try:
            return found, self.load(found, template)
        except DamagedCheckpointError:
            if self._verify == "full":
                raise
            self._verify = "full"
        found = find()
        return None if found is None else (found, self.load(found, template))

    def _read(self, found: Found, template: Mapping[str, Any]) -> Loaded:
        storage = self._storage if found.root == self._storage.root else open_storage(found.root)
        with Reader(storage, found.name, found.manifest) as reader:
            return Loaded(reader.read_state(template), reader.read_per_rank(), found.manifest)

    def _begin(self) -> tuple[int, str]:
        folders = self._storage.folders()
        for folder, problem in sweep(self._storage).items():
            if problem is None:
                log.warning("removed %s/%s, which an earlier attempt left unfinished", self._storage.root, folder)
            else:
                log.warning("%s/%s was left unfinished and cannot be removed: %s", self._storage.root, folder, problem)
        return next_order(folders), uuid.uuid4().hex[:8]

    def _is_busy_anywhere(self) -> bool:
        busy = self._last is not None and not self._last.done()
        return self._coordinator.vote([int(busy)]).wait()[0] > 0

    def _take_snapshot(self, state: Mapping[str, Any], per_rank: Any) -> tuple[Snapshot | None, str | None]:
        """This rank's part, or why there is none; the ranks hear of that when they meet."""
        try:
            rank, world_size = self._background.rank, self._background.world_size
            return take_snapshot(state, per_rank, self._stager, rank, world_size), None
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"


def _own_coordinator(timeout: float) -> Coordinator:
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Alone()
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    assert isinstance(group, dist.ProcessGroup)
    return GroupCoordinator(group)


_AT_EXIT_S = 10.0


class Pending:
    """A save that was begun, or left out because another was under way.

    Attributes:
        step: of the save.
        name: of the checkpoint's folder; None where the save was left out.
        error: why it failed, once it has.
    """

    def __init__(self, step: int, name: Name | None, *, strict: bool) -> None:
        self.step = step
        self.name = str(name) if name is not None else None
        self.error: CheckpointError | None = None
        self._strict = strict
        self._thread: threading.Thread | None = None

    def begin(self, write: Callable[[], CheckpointError | None]) -> None:
        """Have `write` called in a thread; it returns why it failed."""
        self._thread = threading.Thread(target=self._write, args=(write,), daemon=True, name=f"allstep-{self.name}")
        atexit.register(self._thread.join, _AT_EXIT_S)
        self._thread.start()

    @property
    def skipped(self) -> bool:
        """Whether it was left out."""
        return self.name is None

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
            if self._thread.is_alive():
                return False
            atexit.unregister(self._thread.join)
            self._thread = None
        if self.error is not None and self._strict:
            raise self.error
        return self.error is None and not self.skipped

    def _write(self, write: Callable[[], CheckpointError | None]) -> None:
        error: CheckpointError | None = CheckpointError(f"step {self.step} was not saved: its thread did not finish")
        try:
            error = write()
        finally:
            self.error = error
