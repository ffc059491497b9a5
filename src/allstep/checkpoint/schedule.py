"""When a checkpoint is due: after so many iterations or epochs, or after some time, the same on every rank.

Contract: `Checkpoint` asks `iteration_is_due` after each accumulation group and `epoch_is_due` at each epoch's end, and
says with `saved` that it did. Iterations and epochs are counted alike everywhere. Clocks are not: rank 0's decides, and
it is asked in a broadcast at iterations that all ranks know, close enough together for the time to be kept within a
twentieth or two seconds, and never so close that asking costs anything.

What a run is told to go on from: by its script, by the command line, and by what the same launch has saved before.

Contract: pure functions over an environment, asked by `Checkpoint.resume`. The command line's word, which comes in
ALLSTEP_RESUME, holds for scripts that name nothing themselves. It is about a launch, not about each start of its
processes: a supervisor's restart, or a requeued SLURM job, has the same ALLSTEP_RESUME and goes on from what the
launch itself has saved, if anything. So every checkpoint says which launch saved it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from allstep.coordination import Coordinator

Every: TypeAlias = int | str | timedelta

_UNITS = {"iteration": 1.0, "epoch": 1.0, "second": 1.0, "minute": 60.0, "hour": 3600.0}
_TEXT = re.compile(r"(?:(\d+(?:\.\d+)?)\s*)?([a-z]+?)s?")


@dataclass(frozen=True, slots=True)
class Times:
    """When: each so many iterations, epochs, or seconds; None for never."""

    iterations: int | None = None
    epochs: int | None = None
    seconds: float | None = None


def read_every(every: Every | Sequence[Every] | None) -> Times:
    """Read `every`: iterations as an int, a timedelta, a text such as "epoch" or "10 minutes", or several of these.

    Raises:
        ValueError: it is none of these.
    """
    found: dict[str, float] = {}
    several = every if isinstance(every, Sequence) and not isinstance(every, str) else (every,)
    for each in () if every is None else several:
        name, count = _read_one(each)
        found[name] = min(count, found.get(name, count))
    iterations, epochs = found.get("iterations"), found.get("epochs")
    return Times(
        None if iterations is None else int(iterations), None if epochs is None else int(epochs), found.get("seconds")
    )


def _read_one(each: object) -> tuple[str, float]:
    if isinstance(each, timedelta) and each.total_seconds() > 0:
        return "seconds", each.total_seconds()
    if isinstance(each, int) and not isinstance(each, bool) and each >= 1:
        return "iterations", each
    match = _TEXT.fullmatch(each.strip().lower()) if isinstance(each, str) else None
    if match is not None and match[2] in _UNITS:
        count = float(match[1] or 1) * _UNITS[match[2]]
        kind = match[2] + "s" if match[2] in ("iteration", "epoch") else "seconds"
        if count > 0 and (kind == "seconds" or count.is_integer()):
            return kind, count
    raise ValueError(
        f'every is {each!r}; give iterations as an int, a timedelta, or a text such as "epoch", "2 epochs", '
        '"500 iterations" or "10 minutes"'
    )


class Schedule:
    """Whether a checkpoint is due, of one run."""

    def __init__(
        self, times: Times, coordinator: Coordinator, iteration: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._times = times
        self._coordinator = coordinator
        self._clock = clock
        self._saved_at = iteration
        self._began = self._asked_at = clock()
        self._ask_at = self._last_ask = iteration
        self._is_late = False

    def iteration_is_due(self, iteration: int) -> bool:
        """Whether to save after this iteration, which ends a group."""
        every = self._times.iterations
        if every is not None and iteration // every > self._saved_at // every:
            return True
        if self._times.seconds is not None and iteration >= self._ask_at:
            self._ask(iteration)
        return self._is_late

    def epoch_is_due(self, epoch: int, iteration: int) -> bool:
        """Whether to save at this epoch's end."""
        every = self._times.epochs
        return (every is not None and epoch % every == 0) or self.iteration_is_due(iteration)

    def saved(self, iteration: int) -> None:
        """A checkpoint was taken after this iteration."""
        self._saved_at, self._is_late = iteration, False
        self._began = self._clock()

    def _ask(self, iteration: int) -> None:
        assert self._times.seconds is not None
        now = self._clock()
        pace = (now - self._asked_at) / max(1, iteration - self._last_ask)
        apart = max(2.0, self._times.seconds / 20)
        steps = min(int(apart / pace) if pace > 0 else 1 << 20, 4 * max(1, iteration - self._last_ask))
        mine = (now - self._began >= self._times.seconds, iteration + max(1, steps))
        self._is_late, self._ask_at = self._coordinator.broadcast(mine, 0)
        self._last_ask, self._asked_at = iteration, now


RESUME_VARIABLE = "ALLSTEP_RESUME"
LAUNCH_VARIABLE = "ALLSTEP_LAUNCH"


def asked_for(at: str, environ: Mapping[str, str]) -> str:
    """What to resume from, given the script's word: "auto", "none", or a path."""
    return at if at != "auto" else environ.get(RESUME_VARIABLE) or "auto"


def overruled(at: str, environ: Mapping[str, str]) -> str | None:
    """What the command line asks for and the script's word does not grant, or None."""
    asked = environ.get(RESUME_VARIABLE) or "auto"
    return asked if asked not in ("auto", asked_for(at, environ)) else None


def launches_of(environ: Mapping[str, str]) -> list[str]:
    """Names of what this process was launched by, for its checkpoints: each is the same in all restarts of that."""
    job, launch = environ.get("SLURM_JOB_ID"), environ.get(LAUNCH_VARIABLE)
    elastic = environ.get("TORCHELASTIC_RUN_ID", "none")
    names = [f"allstep-{launch}"] if launch else [] if elastic in ("", "none") else [f"torchrun-{elastic}"]
    return [*names, *([f"slurm-{job}"] if job else [])]


def restarts_of(environ: Mapping[str, str]) -> list[str]:
    """Those of `launches_of` that may have been here before, so that their checkpoints are to be gone on from.

    A job and a run id of torchrun's may have other runs in them; only their restarts are the same run. (An attempt of
    `allstep run` has a number that grows over several uses of its name, and no other launch has its launch's name.)
    """
    requeued = environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    restarted = environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    again = {"allstep": True, "torchrun": restarted, "slurm": requeued}
    return [name for name in launches_of(environ) if again[name.partition("-")[0]]]
