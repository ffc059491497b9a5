"""Which checkpoint all ranks load.

Contract: every rank calls `choose` at the same point. Rank 0 lists what there is, newest first, and reads manifests;
each rank looks whether it sees the files, and reads and hashes its share of them; all hear what all found. So all
return the same, and none returns a checkpoint that was not verified. Where ranks disagree about what they see, those
that see less wait for it, up to a limit; where all see the same damage nobody waits. A damaged checkpoint is set aside,
with the reason in a file, and the one before it is tried. One that some ranks do not see is passed over and left as it
is. Everything passed over is reported on every rank.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

from allstep.checkpoint.layout import SET_ASIDE, read_name
from allstep.checkpoint.manifest import Manifest
from allstep.checkpoint.storage import Storage
from allstep.checkpoint.verifying import Verify, load_manifest, wrong_hashes, wrong_sizes
from allstep.coordination import Coordinator
from allstep.errors import CheckpointError, DamagedCheckpointError
from allstep.world.polling import poll

T = TypeVar("T")

log = logging.getLogger("allstep.checkpoint")


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that was verified.

    Attributes:
        root: the folder of checkpoints that it is in.
        name: of its own folder.
        manifest: what it says about itself.
        passed_over: newer ones that were not used, with the reason.
    """

    root: str
    name: str
    manifest: Manifest
    passed_over: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Verdict:
    problem: str | None
    damaged: bool = False


def choose(
    storage: Storage, coordinator: Coordinator, *, verify: Verify, patience: float, only: str | None = None
) -> Found | None:
    """The newest checkpoint that verifies; None where there is none.

    Args:
        storage: the folder of checkpoints.
        coordinator: of the ranks that choose.
        verify: read and hash every file ("full"), or look at sizes ("size").
        patience: seconds for which files are waited for that some ranks see and others do not.
        only: the name of the one checkpoint that will do; it is not set aside.

    Raises:
        CheckpointError: `only` is not there or does not verify, on every rank.
    """
    folders = from_first(coordinator, lambda: [only] if only else _candidates(storage))
    passed_over: list[tuple[str, str]] = []
    for folder in folders:
        manifest = from_first(coordinator, partial(_manifest, storage, folder))
        if isinstance(manifest, str):
            verdict = _Verdict(manifest, damaged=True)
        else:
            verdict = _judge(storage, coordinator, folder, manifest, verify, patience)
            if verdict.problem is None:
                return Found(storage.root, folder, manifest, tuple(passed_over))
        assert verdict.problem is not None
        if only:
            raise CheckpointError(f"checkpoint {storage.root}/{only} cannot be used: {verdict.problem}")
        passed_over.append((folder, verdict.problem))
        log.warning("checkpoint %s/%s is passed over: %s", storage.root, folder, verdict.problem)
        if verdict.damaged and coordinator.rank == 0:
            _set_aside(storage, folder, verdict.problem)
    return None


def from_first(coordinator: Coordinator, ask: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank.

    Raises:
        CheckpointError: rank 0 met an error; on every rank.
    """
    answer: T | None = None
    failure: str | None = None
    if coordinator.rank == 0:
        try:
            answer = ask()
        except Exception as error:  # file systems behind fsspec have errors of their own
            failure = f"{type(error).__name__}: {error}"
    answer, failure = coordinator.broadcast((answer, failure), 0)
    if failure is not None:
        raise CheckpointError(f"rank 0 cannot read the checkpoints: {failure}")
    return cast(T, answer)


def _candidates(storage: Storage) -> list[str]:
    names = sorted((name for folder in storage.folders() if (name := read_name(folder))), reverse=True)
    return [str(name) for name in names if SET_ASIDE not in storage.files(str(name))]


def _manifest(storage: Storage, folder: str) -> Manifest | str:
    try:
        return load_manifest(storage, folder)
    except DamagedCheckpointError as error:
        return str(error)


def _judge(
    storage: Storage, coordinator: Coordinator, folder: str, manifest: Manifest, verify: Verify, patience: float
) -> _Verdict:
    seen = coordinator.gather(_look(storage, folder, manifest))
    if any(seen) and not all(seen):
        _wait_for_files(storage, folder, manifest, patience)
        seen = coordinator.gather(_look(storage, folder, manifest))
    if any(seen):
        return _Verdict(_spell(seen), damaged=all(seen))
    if verify == "size":
        return _Verdict(None)
    share = list(manifest.files)[coordinator.rank :: coordinator.world_size]
    wrong = coordinator.gather(wrong_hashes(storage, folder, manifest, share))
    return _Verdict(_spell(wrong), damaged=True) if any(wrong) else _Verdict(None)


def _look(storage: Storage, folder: str, manifest: Manifest) -> list[str]:
    try:
        return wrong_sizes(storage, folder, manifest)
    except OSError as error:
        return [f"its files cannot be listed: {error}"]


def _wait_for_files(storage: Storage, folder: str, manifest: Manifest, patience: float) -> None:
    poll(lambda: not _look(storage, folder, manifest), time.monotonic() + patience)


def _spell(problems: list[list[str]]) -> str:
    for rank, found in enumerate(problems):
        if found:
            others = sum(map(bool, problems)) - 1
            return f"rank {rank} finds that {'; '.join(found[:3])}" + (f" (and {others} more ranks)" if others else "")
    return ""


def _set_aside(storage: Storage, folder: str, problem: str) -> None:
    note = json.dumps({"problem": problem, "found": time.time()}).encode()
    try:
        storage.write(folder, SET_ASIDE, [note])
    except OSError as error:
        log.warning("checkpoint %s/%s cannot be set aside: %s", storage.root, folder, error)
