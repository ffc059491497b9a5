"""One fault as a value: what happens to a rank, and where in a job; pure.

Contract: `KINDS` has every kind of fault: how its argument is written, and where it can strike. What each does is in
`inject`. `Fault` is frozen and checked when it is made, so that a plan that exists can be carried out. `RankPosition`
is where a rank is when it asks whether a fault strikes it; `Fault.strikes` answers. A fault strikes once in a process,
at the first position that fits, unless its kind repeats: then there and in every later iteration.
"""

from __future__ import annotations

import builtins
import math
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args
from urllib.parse import quote, unquote

from allstep.errors import ConfigurationError

When = Literal["preflight", "start", "data", "step", "handler", "exit"]
"""Points at which faults strike: the preflight, before the ranks meet, before a batch, in the step, after it, at the
end."""

WHENS: tuple[When, ...] = get_args(When)
IN_A_RUN: tuple[When, ...] = ("data", "step", "handler")
"""Those of an engine's run, where iterations and epochs are counted."""

_UNITS = {"": 1, "k": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception to raise: its type as `module.name`, or a name alone for a built-in one, and its message."""

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class FlippedBit:
    """A bit, counted from the lowest, of the first element of the parameter that a wrapped model has by this name."""

    parameter: str
    bit: int = 0


@dataclass(frozen=True, slots=True)
class FaultKind:
    """How a kind of fault is written.

    `read` turns the text after `=` into the argument, and is None where there is none; `write` turns it back.
    `example` is shown where a text is wrong. `repeats`: it strikes from its place on, in every iteration. `whens`:
    where it can strike; empty for anywhere.
    """

    example: str
    read: Callable[[str], Any] | None = None
    write: Callable[[Any], str] = str
    repeats: bool = False
    whens: tuple[str, ...] = ()


def _exception(text: str) -> Raised:
    name, _, message = text.partition(":")
    known = getattr(builtins, name, None)  # a dotted name is looked up when it is raised, in the rank
    if "." not in name and not (isinstance(known, type) and issubclass(known, BaseException)):
        raise ConfigurationError("it must be an exception such as ValueError:message or my_module.MyError:message")
    return Raised(name, unquote(message))


def _write_exception(raised: Raised) -> str:
    return raised.type + (f":{_quoted(raised.message)}" if raised.message else "")


def _signal(text: str) -> int:
    try:
        return int(signal.Signals[text] if text.startswith("SIG") else signal.Signals(int(text)))
    except (KeyError, ValueError):
        raise ConfigurationError("it must be a signal such as 9 or SIGKILL") from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (value >= 0 and math.isfinite(value)):  # also refuses not a number
        raise ConfigurationError("it must be a number of seconds")
    return value


def _exit_code(text: str) -> int:
    # The system keeps only the lowest eight bits of an exit code.
    if not re.fullmatch("[0-9]{1,3}", text) or int(text) > 255:
        raise ConfigurationError("it must be an exit code from 0 to 255")
    return int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})([kMG]?)", text)
    if match is None:
        raise ConfigurationError("it must be a number of bytes such as 500000, 800k, 64M or 2G")
    return int(match[1]) * _UNITS[match[2]]


def _path(text: str) -> str:
    if not text:
        raise ConfigurationError("it must be a folder")
    return unquote(text)


def _flipped(text: str) -> FlippedBit:
    name, _, bit = text.partition(":")
    if not name or (bit and not re.fullmatch("[0-9]{1,2}", bit)):
        raise ConfigurationError("it must be the name of a parameter, with the number of a bit such as 0.weight:30")
    return FlippedBit(unquote(name), int(bit or 0))


def _write_flipped(flipped: FlippedBit) -> str:
    return f"{quote(flipped.parameter, safe='')}:{flipped.bit}"


def _quoted(text: str) -> str:
    """The text without what separates faults and their parts, nor spaces at its ends, which are not read."""
    body = text.strip(" ")  # a reader strips each part, so that spaces at the ends have to be quoted
    before, _, after = text.partition(body) if body else (text, "", "")
    return quote(before) + quote(body, safe=" !\"#$&'()*+/:<>?@[\\]^_`{|}~.-") + quote(after)


KINDS = {
    "raise": FaultKind("raise=ValueError:message", _exception, _write_exception),
    "kill": FaultKind("kill=9", _signal),
    "freeze": FaultKind("freeze"),
    "hold_gil": FaultKind("hold_gil=60", _seconds),
    "sleep": FaultKind("sleep=60", _seconds),
    "slow": FaultKind("slow=0.1", _seconds, repeats=True, whens=IN_A_RUN),
    "exit": FaultKind("exit=0", _exit_code),
    "leave": FaultKind("leave", whens=IN_A_RUN),
    "segfault": FaultKind("segfault"),
    "abort": FaultKind("abort"),
    "fill_disk": FaultKind("fill_disk=/folder", _path, _quoted),
    "allocate": FaultKind("allocate=64G", _bytes),
    "ignore": FaultKind("ignore=SIGTERM", _signal, lambda number: signal.Signals(number).name),
    "nan": FaultKind("nan", whens=("step",)),
    "flip": FaultKind("flip=0.weight:30", _flipped, _write_flipped, whens=IN_A_RUN),
    "wrong_sums": FaultKind("wrong_sums", whens=("preflight",)),
    "clock": FaultKind("clock=60", _seconds, whens=("preflight",)),
}
"""Every kind of fault, by its name in a plan's text."""


@dataclass(frozen=True, slots=True)
class RankPosition:
    """Where a rank is. `iteration` and `epoch` count from 1 as reports do, and are 0 outside an engine's run."""

    when: When
    rank: int
    attempt: int = 0
    epoch: int = 0
    iteration: int = 0

    def __str__(self) -> str:
        place = f"rank {self.rank}, "
        if self.when in IN_A_RUN:
            return f"{place}epoch {self.epoch}, iteration {self.iteration} ({self.when})"
        return (
            place
            + {
                "preflight": "before it is started",
                "start": "before it meets the others",
                "exit": "as it leaves its World",
            }[self.when]
        )


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
        when: "preflight" (before the rank is started), "start" (in `allstep.init`, before the ranks meet), "data"
            (before a batch is taken), "step", "handler" (after the step) or "exit" (as the World is left).

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
        allowed = KINDS[self.kind].whens  # empty for anywhere
        if allowed and self.when not in allowed:
            raise ConfigurationError(f"{self.kind} can strike when={' or '.join(allowed)}, not when={self.when}")

    def strikes(self, position: RankPosition) -> bool:
        """Whether this is its place."""
        first, last = self.attempts or (0, position.attempt)  # without a span every attempt fits
        # A kind that repeats strikes from its iteration on.
        begun = self.iteration is not None and KINDS[self.kind].repeats and position.iteration > self.iteration
        return (
            self.when == position.when
            and self.rank in (None, position.rank)
            and (begun or self.iteration in (None, position.iteration))
            and self.epoch in (None, position.epoch)
            and first <= position.attempt <= last
        )
