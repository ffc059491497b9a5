"""Which checkpoint a run resumes from: what was asked for, and the choice that all ranks make together.

What was asked for is decided by pure functions over an environment. The command line's `--resume`, which comes in
ALLSTEP_RESUME, holds for scripts that name nothing themselves. It is about a launch, not about each start of its
processes. A restart by the supervisor, or a requeued SLURM job, has the same ALLSTEP_RESUME and goes on from what the
launch itself has saved, if anything. So every checkpoint says which launch saved it.

Contract of the choice: every rank calls `choose` at the same point. What any rank lists is a candidate, newest first.
Rank 0 reads manifests. Each rank checks whether it sees the files, then reads and hashes its share of them; all hear
what all found. So all return the same, and none returns a checkpoint that was not verified.

- Where ranks disagree about what they see, those that see less wait for it, up to a limit.
- What cannot be read is tried again within the same limit. Where all see the same damage nobody waits.
- A damaged checkpoint, one in which something was read and is wrong, is quarantined: the reason is put into a file in
  it, and the one before it is tried. It is reported on every rank.
- One that some ranks do not see, or cannot read, may be whole. Nothing older is chosen in its place, for that would
  train anew what it holds: it is an error on every rank, which says how to go on without it.
- One that is not finished yet, which is seen only where there is no rename, is no checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, cast

from allstep.checkpoint.catalog import Verify, quarantine, wrong_hashes, wrong_sizes
from allstep.checkpoint.manifest import MANIFEST, QUARANTINE, CheckpointName, Manifest, load_manifest, read_name
from allstep.checkpoint.storage import Storage
from allstep.coordination import Coordinator
from allstep.errors import (
    CheckpointError,
    DamagedCheckpointError,
    FolderInUseError,
    NewerCheckpointError,
    printable,
)
from allstep.world.bounded_store import poll

T = TypeVar("T")

log = logging.getLogger("allstep.checkpoint")

RESUME_VARIABLE = "ALLSTEP_RESUME"
LAUNCH_VARIABLE = "ALLSTEP_LAUNCH"
TAKE_OVER_VARIABLE = "ALLSTEP_TAKE_OVER"


def resume_from(at: str, environ: Mapping[str, str]) -> str:
    """What to resume from, given what the script says: "auto", "none", or a path."""
    return at if at != "auto" else environ.get(RESUME_VARIABLE) or "auto"


def overruled_resume(at: str, environ: Mapping[str, str]) -> str | None:
    """What the command line asks for where the script says something else, or None."""
    asked = environ.get(RESUME_VARIABLE) or "auto"
    return asked if asked not in ("auto", resume_from(at, environ)) else None


def launches_of(environ: Mapping[str, str]) -> list[str]:
    """Names of what launched this process, for its checkpoints: each is the same in all restarts of that launch."""
    job, launch = environ.get("SLURM_JOB_ID"), environ.get(LAUNCH_VARIABLE)
    elastic = environ.get("TORCHELASTIC_RUN_ID", "none")
    # Under `allstep run` torchrun's variables are inherited from outside, if at all, and say nothing of this launch.
    names = [f"allstep-{launch}"] if launch else [] if elastic in ("", "none") else [f"torchrun-{elastic}"]
    return [*names, *([f"slurm-{job}"] if job else [])]


def attempts_of(environ: Mapping[str, str]) -> dict[str, int]:
    """The same names, each with the number of this start among those of its launch."""
    numbers = {"allstep": "ALLSTEP_ATTEMPT", "torchrun": "TORCHELASTIC_RESTART_COUNT", "slurm": "SLURM_RESTART_COUNT"}
    found = {name: environ.get(numbers[name.partition("-")[0]], "") for name in launches_of(environ)}
    return {name: int(text) if text.isdecimal() and len(text) < 10 else 0 for name, text in found.items()}


def asks_to_take_over(environ: Mapping[str, str]) -> bool:
    """Whether the command line says to take a folder over from a job that is alive."""
    return environ.get(TAKE_OVER_VARIABLE, "") not in ("", "0")


def restarted_launches(environ: Mapping[str, str]) -> list[str]:
    """Those of `launches_of` that may have run before this start, so that their checkpoints are this run's own.

    A SLURM job and a run id of torchrun's may have other runs in them; only their restarts are the same run. (An
    attempt of `allstep run` has a number that grows over several uses of its name, and no other launch has its name.)
    """
    requeued = environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    restarted = environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    may_have_run = {"allstep": True, "torchrun": restarted, "slurm": requeued}
    return [name for name in launches_of(environ) if may_have_run[name.partition("-")[0]]]


def was_saved_by(manifest: Manifest, launches: Sequence[str]) -> bool:
    """Whether one of these launches saved the checkpoint of a manifest."""
    return not set(launches).isdisjoint(manifest.facts.get("launches", ()))


# The choice of all ranks


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
class _Listing:
    """What a rank finds wrong in the list of a checkpoint's files."""

    problems: list[str]
    was_listed: bool = True


@dataclass(frozen=True, slots=True)
class _Finding:
    """What all ranks found: why a checkpoint cannot be used, and whether that is damage, or it is not finished."""

    problem: str | None
    damaged: bool = False
    unfinished: bool = False


def choose(
    storage: Storage, coordinator: Coordinator, *, verify: Verify, patience: float, only: str | None = None
) -> Found | None:
    """The newest checkpoint that verifies; None where there is none.

    Args:
        storage: the folder of checkpoints.
        coordinator: of the ranks that choose.
        verify: read and hash every file ("full"), or look at sizes ("size").
        patience: seconds for which files are waited for that some ranks see and others do not, or that cannot be read.
        only: the name of the one checkpoint that will do; it is not quarantined.

    Raises:
        CheckpointError: `only` is not there or does not verify, or one that may be whole cannot be read.
    """
    folders = [only] if only else _candidates(storage, coordinator)
    passed_over: list[tuple[str, str]] = []
    for folder in folders:
        manifest = _read_manifest(storage, coordinator, folder, patience)
        if isinstance(manifest, _Finding):
            finding = manifest
        else:
            finding = _verify_files(storage, coordinator, folder, manifest, verify, patience)
            if finding.problem is None:
                return Found(storage.root, folder, manifest, tuple(passed_over))
        assert finding.problem is not None
        if only:
            raise CheckpointError(f"checkpoint {storage.root}/{only} cannot be used: {finding.problem}")
        if not finding.damaged and not finding.unfinished:
            raise CheckpointError(
                f"checkpoint {storage.root}/{folder} cannot be read, and may be whole: {finding.problem}. Try again "
                "when it can be read, such as when a file server is back; or say what to go on from, with allstep run "
                "--resume PATH or checkpoint.resume(PATH)"
            )
        passed_over.append((folder, finding.problem))
        log.warning("checkpoint %s/%s is passed over: %s", storage.root, folder, printable(finding.problem))
        if finding.damaged and coordinator.rank == 0:
            _try_to_quarantine(storage, folder, finding.problem)
    return None


def ask_rank_zero(coordinator: Coordinator, ask: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank.

    Raises:
        FolderInUseError: what rank 0 asked for is another job's; on every rank.
        CheckpointError: rank 0 met an error; on every rank.
    """
    answer: T | None = None
    failure: str | None = None
    in_use: str | None = None
    if coordinator.rank == 0:
        try:
            answer = ask()
        except FolderInUseError as error:
            in_use = str(error)
        except Exception as error:  # file systems behind fsspec have errors of their own
            failure = f"{type(error).__name__}: {error}"
    answer, failure, in_use = coordinator.broadcast((answer, failure, in_use), 0)
    if in_use is not None:
        raise FolderInUseError(in_use)
    if failure is not None:
        raise CheckpointError(f"rank 0 cannot use the checkpoints: {failure}")
    return cast(T, answer)


def _candidates(storage: Storage, coordinator: Coordinator) -> list[str]:
    """What any rank sees: a folder that rank 0 does not see yet is waited for as a file is."""
    seen, quarantined = ask_rank_zero(coordinator, lambda: (_names(storage), _quarantined_names(storage)))
    for names in coordinator.gather(_names_seen(storage)):
        seen = seen | names
    return [str(name) for name in sorted(seen - quarantined, reverse=True)]


def _names(storage: Storage) -> frozenset[CheckpointName]:
    return frozenset(name for folder in storage.folders() if (name := read_name(folder)))


def _names_seen(storage: Storage) -> frozenset[CheckpointName]:
    try:
        return _names(storage)
    except Exception:  # a rank that sees nothing is asked about each of the others' candidates
        return frozenset()


def _quarantined_names(storage: Storage) -> frozenset[CheckpointName]:
    return frozenset(name for name in _names(storage) if QUARANTINE in storage.files(str(name)))


def _read_manifest(storage: Storage, coordinator: Coordinator, folder: str, patience: float) -> Manifest | _Finding:
    """Rank 0's reading of the manifest, after a wait where some ranks see one and others do not."""
    seen = coordinator.gather(_sees_manifest(storage, folder))
    # Network file systems show a new file late on some hosts.
    if any(seen) and not all(seen):
        poll(lambda: _sees_manifest(storage, folder), time.monotonic() + patience)
    found = ask_rank_zero(coordinator, partial(_load_manifest, storage, folder, patience))
    if isinstance(found, _Finding) and not seen[0]:
        # Without rename, one that has no manifest is a save that was not committed, or not yet.
        is_seen = any(seen)
        return replace(
            found,
            damaged=found.damaged and storage.has_rename and not is_seen,
            unfinished=found.damaged and not storage.has_rename and not is_seen,
        )
    return found


def _sees_manifest(storage: Storage, folder: str) -> bool:
    try:
        return MANIFEST in storage.files(folder)
    except Exception:
        return False


def _load_manifest(storage: Storage, folder: str, patience: float) -> Manifest | _Finding:
    """The manifest, tried again for a while where it cannot be read; damage is not tried again."""
    found: Manifest | _Finding = _Finding(None)

    def is_settled() -> bool:
        nonlocal found
        try:
            found = load_manifest(storage, folder)
        except NewerCheckpointError:
            raise  # not damage; and nobody wants to train anew beside a checkpoint of a newer version
        except CheckpointError as error:
            found = _Finding(str(error), damaged=isinstance(error, DamagedCheckpointError))
            return found.damaged
        return True

    poll(is_settled, time.monotonic() + patience)
    return found


def _verify_files(
    storage: Storage, coordinator: Coordinator, folder: str, manifest: Manifest, verify: Verify, patience: float
) -> _Finding:
    listings: list[_Listing] = coordinator.gather(_list_files(storage, folder, manifest))
    if len({bool(each.problems) for each in listings}) > 1 or not all(each.was_listed for each in listings):
        poll(lambda: not _list_files(storage, folder, manifest).problems, time.monotonic() + patience)
        listings = coordinator.gather(_list_files(storage, folder, manifest))
    if any(each.problems for each in listings):
        # Damage is what all see. What one rank alone misses may be its view of the file system.
        damaged = all(each.problems and each.was_listed for each in listings)
        return _Finding(_summary([each.problems for each in listings]), damaged)
    if verify == "size":
        return _Finding(None)
    # Each file is read by one rank: all together read the checkpoint once.
    share = list(manifest.files)[coordinator.rank :: coordinator.world_size]
    found = coordinator.gather(_hash_files(storage, folder, manifest, share, patience))
    wrong, unread = [each for each, _ in found], [each for _, each in found]
    return _Finding(_summary(wrong) or _summary(unread) or None, damaged=any(wrong))


def _hash_files(
    storage: Storage, folder: str, manifest: Manifest, share: list[str], patience: float
) -> tuple[list[str], list[str]]:
    """What a rank finds wrong in its share of the files, and what of it cannot be read, after a while of trying."""
    wrong: list[str] = []
    unread = dict.fromkeys(share, "")

    def is_settled() -> bool:
        nonlocal wrong, unread
        found, unread = wrong_hashes(storage, folder, manifest, unread)
        wrong += found
        return bool(wrong) or not unread

    poll(is_settled, time.monotonic() + patience)
    return wrong, list(unread.values())


def _list_files(storage: Storage, folder: str, manifest: Manifest) -> _Listing:
    try:
        return _Listing(wrong_sizes(storage, folder, manifest))
    except Exception as error:
        return _Listing([f"its files cannot be listed: {error}"], was_listed=False)


def _summary(problems: list[list[str]]) -> str:
    """The problems of the first rank that has any, and how many others have some."""
    for rank, found in enumerate(problems):
        if found:
            others = sum(map(bool, problems)) - 1
            return f"rank {rank} finds that {'; '.join(found[:3])}" + (f" (and {others} more ranks)" if others else "")
    return ""


def _try_to_quarantine(storage: Storage, folder: str, problem: str) -> None:
    try:
        quarantine(storage, folder, problem)
    except Exception as error:  # as in a folder that is mounted for reading; the next start finds the damage again
        log.warning("checkpoint %s/%s cannot be quarantined: %s", storage.root, folder, error)
