"""Which checkpoint all ranks load.

Contract: every rank calls `choose` at the same point. What any rank lists is a candidate, newest first. Rank 0 reads
manifests; each rank looks whether it sees the files, and reads and hashes its share of them; all hear what all found.
So all return the same, and none returns a checkpoint that was not verified. Where ranks disagree about what they see,
those that see less wait for it, up to a limit; where all see the same damage nobody waits. What cannot be read is tried
again within the same limit. A damaged checkpoint, one in which something was read and is wrong, is set aside, with the
reason in a file, and the one before it is tried. One that some ranks do not see, or cannot read, is passed over and
left as it is. Everything passed over is reported on every rank.

Which checkpoints are no longer needed: a pure function, asked after a commit and at no other time.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar, cast

from allstep.checkpoint.catalog import Verify, load_manifest, wrong_hashes, wrong_sizes
from allstep.checkpoint.manifest import MANIFEST, SET_ASIDE, Manifest, Name, read_name
from allstep.checkpoint.storage import Storage
from allstep.coordination import Coordinator
from allstep.errors import CheckpointError, DamagedCheckpointError, NewerCheckpointError
from allstep.world.store import poll

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
class _Look:
    """What a rank sees in the list of files."""

    problems: list[str]
    was_listed: bool = True


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
        patience: seconds for which files are waited for that some ranks see and others do not, or that cannot be read.
        only: the name of the one checkpoint that will do; it is not set aside.

    Raises:
        CheckpointError: `only` is not there or does not verify, on every rank.
    """
    folders = [only] if only else _candidates(storage, coordinator)
    passed_over: list[tuple[str, str]] = []
    for folder in folders:
        manifest = _read_manifest(storage, coordinator, folder, patience)
        if isinstance(manifest, _Verdict):
            verdict = manifest
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


def _candidates(storage: Storage, coordinator: Coordinator) -> list[str]:
    """What any rank sees: a folder that rank 0 does not see yet is waited for as a file is."""
    seen, set_aside = from_first(coordinator, lambda: (_names(storage), _set_aside_names(storage)))
    for names in coordinator.gather(_names_seen(storage)):
        seen = seen | names
    return [str(name) for name in sorted(seen - set_aside, reverse=True)]


def _names(storage: Storage) -> frozenset[Name]:
    return frozenset(name for folder in storage.folders() if (name := read_name(folder)))


def _names_seen(storage: Storage) -> frozenset[Name]:
    try:
        return _names(storage)
    except Exception:  # a rank that sees nothing is asked about each of the others' candidates
        return frozenset()


def _set_aside_names(storage: Storage) -> frozenset[Name]:
    return frozenset(name for name in _names(storage) if SET_ASIDE in storage.files(str(name)))


def _read_manifest(storage: Storage, coordinator: Coordinator, folder: str, patience: float) -> Manifest | _Verdict:
    seen = coordinator.gather(_sees_manifest(storage, folder))
    if any(seen) and not all(seen):
        poll(lambda: _sees_manifest(storage, folder), time.monotonic() + patience)
    found = from_first(coordinator, partial(_manifest, storage, folder, patience))
    if isinstance(found, _Verdict) and not seen[0]:
        # Without rename, one that has no manifest may be a save that another run has under way.
        return replace(found, damaged=found.damaged and storage.has_rename and not any(seen))
    return found


def _sees_manifest(storage: Storage, folder: str) -> bool:
    try:
        return MANIFEST in storage.files(folder)
    except Exception:
        return False


def _manifest(storage: Storage, folder: str, patience: float) -> Manifest | _Verdict:
    found: Manifest | _Verdict = _Verdict(None)

    def settled() -> bool:
        nonlocal found
        try:
            found = load_manifest(storage, folder)
        except NewerCheckpointError:
            raise  # it is no damage, and training anew beside it would not be what anybody wants
        except CheckpointError as error:
            found = _Verdict(str(error), damaged=isinstance(error, DamagedCheckpointError))
            return found.damaged
        return True

    poll(settled, time.monotonic() + patience)
    return found


def _judge(
    storage: Storage, coordinator: Coordinator, folder: str, manifest: Manifest, verify: Verify, patience: float
) -> _Verdict:
    looks: list[_Look] = coordinator.gather(_look(storage, folder, manifest))
    if len({bool(each.problems) for each in looks}) > 1 or not all(each.was_listed for each in looks):
        poll(lambda: not _look(storage, folder, manifest).problems, time.monotonic() + patience)
        looks = coordinator.gather(_look(storage, folder, manifest))
    if any(each.problems for each in looks):
        damaged = all(each.problems and each.was_listed for each in looks)
        return _Verdict(_spell([each.problems for each in looks]), damaged)
    if verify == "size":
        return _Verdict(None)
    share = list(manifest.files)[coordinator.rank :: coordinator.world_size]
    found = coordinator.gather(_read(storage, folder, manifest, share, patience))
    wrong, unread = [each for each, _ in found], [each for _, each in found]
    return _Verdict(_spell(wrong) or _spell(unread) or None, damaged=any(wrong))


def _read(
    storage: Storage, folder: str, manifest: Manifest, share: list[str], patience: float
) -> tuple[list[str], list[str]]:
    """What a rank finds wrong in its share of the files, and what of it cannot be read, after a while of trying."""
    wrong: list[str] = []
    unread = dict.fromkeys(share, "")

    def settled() -> bool:
        nonlocal wrong, unread
        found, unread = wrong_hashes(storage, folder, manifest, unread)
        wrong += found
        return bool(wrong) or not unread

    poll(settled, time.monotonic() + patience)
    return wrong, list(unread.values())


def _look(storage: Storage, folder: str, manifest: Manifest) -> _Look:
    try:
        return _Look(wrong_sizes(storage, folder, manifest))
    except Exception as error:
        return _Look([f"its files cannot be listed: {error}"], was_listed=False)


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
    except Exception as error:
        log.warning("checkpoint %s/%s cannot be set aside: %s", storage.root, folder, error)


KeepBest = tuple[int, str, Literal["max", "min"]]


@dataclass(frozen=True, slots=True)
class Retention:
    """How many checkpoints stay: the newest, and the best by a metric. None keeps all."""

    keep_last: int | None = 3
    keep_best: KeepBest | None = None

    def __post_init__(self) -> None:
        if self.keep_last is not None and not _is_count(self.keep_last):
            raise CheckpointError(f"keep_last is {self.keep_last!r}; it must be 1 or more, or None to keep all")
        if self.keep_best is not None and not _can_be_meant(self.keep_best):
            raise CheckpointError(
                f'keep_best is {self.keep_best!r}; give (1 or more, the name of a metric, "max" or "min")'
            )

    def expendable(self, committed: Sequence[tuple[Name, Manifest]]) -> list[Name]:
        """Those to remove, oldest first. A missing or NaN metric is never among the best; a tie is the older's."""
        if self.keep_last is None:
            return []
        ordered = sorted(committed, key=lambda entry: entry[0])
        kept = {name for name, _ in ordered[-self.keep_last :]}
        if self.keep_best is not None:
            count, metric, direction = self.keep_best
            sign = 1 if direction == "max" else -1
            rated = [
                (sign * manifest.metrics[metric], name)
                for name, manifest in reversed(ordered)
                if not math.isnan(manifest.metrics.get(metric, math.nan))
            ]
            kept.update(name for _, name in sorted(rated, key=lambda entry: entry[0])[-count:])
        return [name for name, _ in ordered if name not in kept]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _can_be_meant(best: object) -> bool:
    if not isinstance(best, Sequence) or len(best) != 3:
        return False
    count, metric, direction = best
    return _is_count(count) and isinstance(metric, str) and direction in ("max", "min")
