"""Who owns a folder of checkpoints: one job at a time saves there, removes old saves and sweeps up.

Two jobs in one folder would remove each other's saves, and go on from each other's. So a job claims the folder before
it saves, and gives it back when it ends.

A claim is a file `owner/claim-NUMBER.json` in the folder of checkpoints. It names the job: host, process, launch,
attempt, and when it was last alive. The claim of the highest number holds. To take the folder over is to create the
next number, which only one of several can do; so nothing has to be locked. Where a store cannot tell who was first, the
newest claim holds, the other job finds out at its next beat or save, and both say so.

Contract: rank 0 calls `claim_folder`. It returns an `Ownership` or raises FolderInUseError with the name of the owner.

- An owner that has given the folder back, or has ended, is followed at once. Whether it has ended is known on its own
  machine, by its process; and where it is an earlier attempt of the same launch, which is over when the next begins.
- Of any other owner, its claim is watched: it is alive if that changes, and dead if it does not for `SILENT_S`. No
  clocks are compared, but that ten minutes of silence by the clock need no watching.
- A live one is refused, unless the folder is taken over by hand.

While it is held, a thread renews the claim every `BEAT_S`. `Ownership.check`, which each commit and removal calls
before it changes anything, raises FolderLostError once another job's claim holds. Only threads of saving and beating
touch the disk; training never does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from allstep.checkpoint.storage import Storage
from allstep.errors import FolderInUseError, FolderLostError, printable
from allstep.world.bounded_store import poll

log = logging.getLogger("allstep.checkpoint")

OWNER = "owner"
"""The folder of claims, among the checkpoints."""

BEAT_S = 10.0
SILENT_S = 60.0  # more than a network file system may show an old state of a file
_SILENT_BY_CLOCK_S = 600.0  # more than clocks of one cluster differ
_READS = 10  # of a claim that is renewed all the time
_LARGEST_CLAIM = 64 << 10  # bytes
_RELEASE_S = 5.0  # that the end of a process waits for a beat under way

Text = Annotated[str, Field(max_length=1000)]


class Claim(BaseModel):
    """What a claim says of the job that makes it.

    Attributes:
        host: where its rank 0 runs.
        machine: what tells that host, and the container on it, from all others while it is up; "" where unknown.
        process: the pid of its rank 0 there.
        started: what tells that process from a later one with its pid; "" where unknown.
        launches: names of what launched it, each with the number of its attempt.
        token: new with each process.
        beat: counts how often the claim was renewed.
        time: when, in seconds since 1970 by its own clock; for people.
        released: whether the job has given the folder back.
        taken_from: launches of the live owner that it was taken from by hand.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # a later version may say more

    host: Text
    machine: Text = ""
    process: int
    started: Text = ""
    launches: dict[Text, int] = {}
    token: Text
    beat: int = 0
    time: float = 0.0
    released: bool = False
    taken_from: tuple[Text, ...] = ()

    @property
    def in_words(self) -> str:
        """The job, for a message."""
        launch = "".join(f", {name}" for name in self.launches)
        return f"process {self.process} on {self.host}{launch}"


@dataclass(frozen=True, slots=True)
class _HoldingClaim:
    """The claim that holds: its number, its bytes, and what they say; None where that cannot be read."""

    number: int = 0
    content: bytes = b""
    claim: Claim | None = None


def claim_of_this_process(launches: Mapping[str, int]) -> Claim:
    """What this process says of itself."""
    pid = os.getpid()
    return Claim(
        host=socket.gethostname(),
        machine=_machine(),
        process=pid,
        started=_start_time(pid) or "",
        launches=dict(launches),
        token=f"{pid}-{_start_time(pid) or uuid.uuid4().hex}-{_machine()}",
        time=time.time(),
    )


def claim_folder(
    storage: Storage, mine: Claim, *, take_over: bool = False, silent: float = SILENT_S, beat: float = BEAT_S
) -> Ownership:
    """Become the owner of a folder.

    Args:
        storage: the folder of checkpoints.
        mine: what this process says of itself.
        take_over: take it from an owner that is alive too, or may be.
        silent: seconds without a beat after which an owner elsewhere is dead.
        beat: seconds between two beats of the new owner.

    Raises:
        FolderInUseError: it belongs to a job that is alive.
    """
    while True:
        holding = _newest(storage)
        is_own = _is_own(holding.claim, mine)
        if holding.number and not is_own:
            if take_over and not _is_gone(holding.claim, mine) and not _was_taken_from(holding.claim, mine):
                log.warning("%s is taken over from %s by hand", storage.root, _in_words(holding.claim))
                mine = mine.model_copy(update={"taken_from": tuple(holding.claim.launches if holding.claim else ())})
            else:
                verdict = _judge(storage, holding, mine, silent)
                if verdict == "alive":
                    raise FolderInUseError(_refusal(storage, holding.claim))
                if verdict == "changed":
                    continue
        # Exactly the number behind the claim that was judged: another job may have followed it meanwhile.
        number = holding.number if is_own else holding.number + 1
        try:
            if number == holding.number:  # another store of this process has it
                storage.replace_file(OWNER, _claim_name(number), _written(mine))
            else:
                storage.create_file(OWNER, _claim_name(number), _written(mine))
        except FileExistsError:
            continue  # another job was quicker; it is judged in its turn
        if not storage.creates_exclusively:
            log.warning(
                "%s cannot tell which of two jobs comes first: where two use it at once, the newest goes on and the "
                "other stops saving",
                storage.root,
            )
        _remove_older(storage, number)
        return Ownership(_HeldClaim(storage, number, mine), beat)


class Ownership:
    """This job's hold on a folder, for as long as this object is in use and its process lives."""

    def __init__(self, held: _HeldClaim, beat: float) -> None:
        self._held = held
        held.start(beat)
        # Also at the interpreter's end. What beats must not keep this object alive.
        self._release = weakref.finalize(self, held.release)

    def check(self) -> None:
        """Raise FolderLostError where the folder is another job's by now."""
        self._held.check()

    def release(self) -> None:
        """Give the folder back; twice is once."""
        self._release()


class _HeldClaim:
    """The claim and the thread that renews it."""

    def __init__(self, storage: Storage, number: int, claim: Claim) -> None:
        self._storage = storage
        self._number = number
        self._claim = claim
        self._pid = os.getpid()
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True, name="allstep-owner")
        self._beat_s = BEAT_S
        self._has_complained = False

    def start(self, beat: float) -> None:
        self._beat_s = beat
        self._thread.start()

    def check(self) -> None:
        with self._lock:
            if self._lost is None:
                self._look()
            if self._lost is not None:
                raise FolderLostError(self._lost)

    def release(self) -> None:
        if os.getpid() != self._pid:
            return  # a fork of the owner is not the owner
        self._over.set()
        # A disk that hangs must not keep the process from ending: who comes next sees that it has ended.
        thread = threading.Thread(target=self._write_released, daemon=True, name="allstep-owner-release")
        with contextlib.suppress(RuntimeError):  # the interpreter is ending, and starts no threads
            thread.start()
            thread.join(_RELEASE_S)
            return
        self._write_released()

    def _write_released(self) -> None:
        with self._lock, contextlib.suppress(Exception):
            holding = _newest(self._storage)
            if holding.number == self._number and _is_own(holding.claim, self._claim):
                self._renew(released=True)

    def _beat_on(self) -> None:
        while not self._over.wait(self._beat_s):
            try:
                with self._lock:
                    if self._over.is_set():
                        return
                    self._look()
                    if self._lost is not None:
                        log.error("%s", self._lost)
                        return
                    self._renew()
                self._has_complained = False
            except Exception as error:  # file systems behind fsspec have errors of their own
                if not self._has_complained:
                    log.warning("the claim on %s cannot be renewed: %s", self._storage.root, error)
                self._has_complained = True

    def _look(self) -> None:
        """Note whether another job's claim holds."""
        holding = _newest(self._storage)
        if holding.number == 0:
            # Somebody has removed the folder of claims, or all of it; the claim is made anew.
            self._storage.create_file(OWNER, _claim_name(self._number), _written(self._claim))
        elif not _is_own(holding.claim, self._claim):
            self._lost = (
                f"the checkpoints in {self._storage.root} have been taken over by {_in_words(holding.claim)}; this "
                "job saves no more there. End one of the two, or give them folders of their own"
            )

    def _renew(self, *, released: bool = False) -> None:
        update = {"beat": self._claim.beat + 1, "time": time.time(), "released": released}
        self._claim = self._claim.model_copy(update=update)
        self._storage.replace_file(OWNER, _claim_name(self._number), _written(self._claim))


# Claims in a folder


def _claim_name(number: int) -> str:
    return f"claim-{number:06d}.json"


def _number(name: str) -> int:
    middle = name.removeprefix("claim-").removesuffix(".json")
    number = int(middle) if middle.isdecimal() and len(middle) < 19 else 0
    return number if number and _claim_name(number) == name else 0


def _newest(storage: Storage) -> _HoldingClaim:
    failures = 0
    while True:
        number = max(map(_number, storage.files(OWNER)), default=0)
        if not number:
            return _HoldingClaim()
        try:
            with storage.open(OWNER, _claim_name(number)) as file:
                content = file.read(_LARGEST_CLAIM)
        except FileNotFoundError:
            continue  # its successor has removed it just now
        except OSError:
            failures += 1  # object stores say so where it was renewed between opening and reading
            if failures > _READS:
                raise
            continue
        try:
            return _HoldingClaim(number, content, Claim.model_validate(json.loads(content)))
        except (ValidationError, ValueError, RecursionError):
            return _HoldingClaim(number, content)


def _written(claim: Claim) -> bytes:
    return json.dumps(claim.model_dump(mode="json"), indent=1).encode() + b"\n"


def _remove_older(storage: Storage, number: int) -> None:
    for name in storage.files(OWNER):
        # ".claim-000007.json.TOKEN" was being written by a job that has died.
        if 0 < _number(f"{name.removeprefix('.').partition('.')[0]}.json") < number:
            with contextlib.suppress(Exception):  # what stays is no more than untidy
                storage.remove_file(OWNER, name)


# Who may follow whom


def _is_own(claim: Claim | None, mine: Claim) -> bool:
    return claim is not None and claim.token == mine.token


def _was_taken_from(claim: Claim | None, mine: Claim) -> bool:
    """Whether the owner took the folder from this very launch, whose restarts must not take it back."""
    return claim is not None and not set(claim.taken_from).isdisjoint(mine.launches)


def _judge(storage: Storage, holding: _HoldingClaim, mine: Claim, silent: float) -> Literal["gone", "alive", "changed"]:
    """Whether the owner is gone or alive, or another claim holds by now; waits where only silence can tell."""
    claim = holding.claim
    known = _is_gone(claim, mine)
    if known is not None:
        return "gone" if known else "alive"
    if claim is not None and time.time() - claim.time > max(_SILENT_BY_CLOCK_S, silent):
        return "gone"
    log.warning(
        "%s belongs to %s; waiting up to %.0f s to see whether that is alive", storage.root, _in_words(claim), silent
    )
    latest = holding

    def has_changed() -> bool:
        nonlocal latest
        latest = _newest(storage)
        return latest.content != holding.content

    if not poll(has_changed, time.monotonic() + silent):
        return "gone"
    now = latest.claim
    beats = claim is not None and now is not None and now.token == claim.token and not now.released
    return "alive" if beats else "changed"


def _is_gone(claim: Claim | None, mine: Claim) -> bool | None:
    """Whether the owner of a claim has ended; None where nobody here can know."""
    if claim is None:
        return None
    if claim.released:
        return True
    # An attempt begins when the one before it has ended, wherever that ran.
    if any(claim.launches.get(name, attempt) < attempt for name, attempt in mine.launches.items()):
        return True
    if claim.machine and claim.machine == mine.machine:
        return not _lives(claim.process, claim.started)
    return None


def _in_words(claim: Claim | None) -> str:
    return "a job whose claim cannot be read" if claim is None else printable(claim.in_words)


def _refusal(storage: Storage, claim: Claim | None) -> str:
    return (
        f"the checkpoints in {storage.root} belong to a job that is alive: {_in_words(claim)}. Two jobs in one folder "
        "would remove each other's saves. Give this job a folder of its own, or end the other one first; a job that is "
        "known to be gone is followed with allstep run --take-over, or Checkpoint(take_over=True)"
    )


# Processes of this machine


def _machine() -> str:
    """This host since it was started, and the container on it; process numbers mean the same wherever this is equal."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None where there is none that runs."""
    try:
        # The name in brackets may hold anything; the state is first behind it, the start the twentieth.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _lives(pid: int, started: str) -> bool:
    return _start_time(pid) == started
