"""One fault as a value: what happens, and where in a job.

Contract: `Fault` is frozen and checked when it is made, so that a plan that exists can be carried out. `Here` is where
a rank stands when it asks whether anything strikes; `Fault.strikes` answers. A fault strikes once in a process, at the
first place that fits, unless its kind repeats: then there and in every later iteration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from allstep.errors import ConfigurationError
from allstep.faults.kinds import KINDS

When = Literal["start", "data", "step", "handler", "exit"]
WHENS: tuple[When, ...] = get_args(When)

IN_A_RUN: tuple[When, ...] = ("data", "step", "handler")


@dataclass(frozen=True, slots=True)
class Here:
    """Where a rank stands. `iteration` and `epoch` count from 1 as reports do, and are 0 outside an engine's run."""

    when: When
    rank: int
    attempt: int = 0
    epoch: int = 0
    iteration: int = 0

    def __str__(self) -> str:
        place = f"rank {self.rank}, "
        if self.when in IN_A_RUN:
            return f"{place}epoch {self.epoch}, iteration {self.iteration} ({self.when})"
        return place + {"start": "before it meets the others", "exit": "as it leaves its World"}[self.when]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a rank, and where.

    Args:
        kind: a key of `KINDS`.
        argument: what that kind takes, or None.
        rank: which rank; None for every rank.
        iteration: which iteration of the run, from 1; None for the first that fits otherwise.
        epoch: which epoch, from 1; None for any.
        attempts: first and last of the starts of the run in which it strikes, from 0; None for all.
        when: "start" (in `allstep.init`, before the ranks meet), "data" (before a batch is taken), "step", "handler"
            (after the step) or "exit" (as the World is left).

    Raises:
        ConfigurationError: a value is out of range, or the kind cannot strike there.
    """

    kind: str
    argument: Any = None
    rank: int | None = None
    iteration: int | None = None
    epoch: int | None = None
    attempts: tuple[int, int] | None = None
    when: When = "step"

    def __post_init__(self) -> None:
        for name, value, least in (("rank", self.rank, 0), ("iteration", self.iteration, 1), ("epoch", self.epoch, 1)):
            if value is not None and value < least:
                raise ConfigurationError(f"{name} is {value}; it must be {least} or more")
        if self.attempts is not None and not 0 <= self.attempts[0] <= self.attempts[1]:
            raise ConfigurationError(f"attempt is {self.attempts[0]}-{self.attempts[1]}; it must be such as 0 or 0-2")
        if self.when not in WHENS:
            raise ConfigurationError(f"when is {self.when!r}; it must be one of {', '.join(WHENS)}")
        if self.when not in IN_A_RUN and (self.iteration is not None or self.epoch is not None):
            raise ConfigurationError(f"when is {self.when!r}, where no iteration or epoch is counted; leave them out")
        allowed = KINDS[self.kind].whens
        if allowed and self.when not in allowed:
            raise ConfigurationError(f"{self.kind} can strike when={' or '.join(allowed)}, not when={self.when}")

    def strikes(self, here: Here) -> bool:
        """Whether this is its place."""
        first, last = self.attempts or (0, here.attempt)
        begun = self.iteration is not None and KINDS[self.kind].repeats and here.iteration > self.iteration
        return (
            self.when == here.when
            and self.rank in (None, here.rank)
            and (begun or self.iteration in (None, here.iteration))
            and self.epoch in (None, here.epoch)
            and first <= here.attempt <= last
        )
