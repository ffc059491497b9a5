"""`FaultPlan`: what a run is to rehearse, built in Python or read from text.

Contract: a plan is a value, and `FaultPlan.parse(plan.to_text()) == plan`. So a plan made in a test travels to every
rank of a job, under any launcher, as the environment variable ALLSTEP_FAULT.

One fault is written as `rank=1,iteration=7,kill=9`, and `read_fault(write_fault(fault)) == fault`; both are pure. In a
message or path `,`, `;`, `=` and `%` are written `%2C`, `%3B`, `%3D` and `%25`. A wrong text raises one
ConfigurationError, which names the part that is wrong and what is allowed there.
"""

from __future__ import annotations

import builtins
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allstep.errors import ConfigurationError
from allstep.faults.fault import KINDS, WHENS, Fault, FlippedBit, Raised, When

VARIABLE = "ALLSTEP_FAULT"
"""The environment variable that carries a plan."""

_SITE_PARTS = ("rank", "iteration", "epoch", "attempt", "when")


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Faults for a run to rehearse; `FaultPlan.at(rank=1, iteration=7).kill(9)`, several added with `+`."""

    faults: tuple[Fault, ...] = ()

    @staticmethod
    def at(
        rank: int | None = None,
        iteration: int | None = None,
        *,
        epoch: int | None = None,
        attempt: int | range | None = None,
        when: When = "step",
    ) -> FaultSite:
        """Say where; the methods of what this gives say what happens there.

        Args:
            rank: which rank; None for every rank.
            iteration: of the run, from 1, as `engine.state.iteration`; by default the first that fits otherwise.
            epoch: from 1; by default any.
            attempt: which start of the run, or a range of them, from 0; by default all.
            when: "preflight" (of `allstep run --preflight`), "start" (in `allstep.init`, before the ranks meet), "data"
                (before the iteration's batch is taken), "step", "handler" (after the step), or "exit" (as the World is
                left).

        Raises:
            ConfigurationError: a value is out of range; raised by the method that says what happens.
        """
        return FaultSite(rank, iteration, epoch, attempt, when)

    @staticmethod
    def parse(text: str) -> FaultPlan:
        """Read a plan such as `rank=1,iteration=7,kill=9`; several faults are separated by `;`.

        Raises:
            ConfigurationError: a part of it is wrong; the message names it and what is allowed.
        """
        return FaultPlan(tuple(read_fault(part) for part in text.split(";") if part.strip()))

    @staticmethod
    def from_environ(environ: Mapping[str, str]) -> FaultPlan:
        """The plan in ALLSTEP_FAULT, or one without faults.

        Raises:
            ConfigurationError: what is there is no plan.
        """
        try:
            return FaultPlan.parse(environ.get(VARIABLE, ""))
        except ConfigurationError as error:
            raise ConfigurationError(f"{VARIABLE}: {error}") from None

    def to_text(self) -> str:
        """The plan as `parse` reads it."""
        return ";".join(write_fault(fault) for fault in self.faults)

    def to_environ(self) -> dict[str, str]:
        """The variable to set in the environment of a job that is to rehearse this plan."""
        return {VARIABLE: self.to_text()}

    def __add__(self, other: FaultPlan) -> FaultPlan:
        return FaultPlan(self.faults + other.faults)


@dataclass(frozen=True, slots=True)
class FaultSite:
    """Where a fault strikes; each method says what happens there, and gives the plan."""

    rank: int | None
    iteration: int | None
    epoch: int | None
    attempt: int | range | None
    when: When

    def raise_(self, error: BaseException) -> FaultPlan:
        """Raise the exception. Its type must be importable, and its arguments at most one text."""
        kind, arguments = type(error), error.args
        # The text of a plan has room for one message; with more, another exception would be raised than was given.
        if len(arguments) > 1 or not all(isinstance(argument, str) for argument in arguments):
            raise ConfigurationError(
                f"{error!r} cannot be sent to a rank: an exception to rehearse has one text as its argument, or none"
            )
        if "<locals>" in kind.__qualname__:
            raise ConfigurationError(
                f"{kind.__qualname__} cannot be found by a rank; define it at a module's top level"
            )
        # By identity, since a user's class may have the name of a built-in one.
        is_builtin = getattr(builtins, kind.__name__, None) is kind
        name = kind.__name__ if is_builtin else f"{kind.__module__}.{kind.__qualname__}"
        return self._plan("raise", Raised(name, arguments[0] if arguments else ""))

    def kill(self, number: int) -> FaultPlan:
        """Send the rank's process a signal."""
        return self._plan("kill", _signal(number))

    def freeze(self) -> FaultPlan:
        """Stop the rank's process with SIGSTOP, all its threads."""
        return self._plan("freeze")

    def hold_gil(self, seconds: float = 3600.0) -> FaultPlan:
        """Sleep in C with the interpreter lock held, for an hour by default: no other thread of the rank runs."""
        return self._plan("hold_gil", float(seconds))

    def sleep(self, seconds: float) -> FaultPlan:
        """Sleep once, as a step does that hangs."""
        return self._plan("sleep", float(seconds))

    def slow(self, seconds: float) -> FaultPlan:
        """Sleep in every iteration from there on, as a slow device does."""
        return self._plan("slow", float(seconds))

    def exit(self, code: int) -> FaultPlan:
        """Call `sys.exit(code)`."""
        return self._plan("exit", code)

    def leave(self) -> FaultPlan:
        """Have `Engine.run` return on this rank, as if it alone were done."""
        return self._plan("leave")

    def segfault(self) -> FaultPlan:
        """Read from address 0."""
        return self._plan("segfault")

    def abort(self) -> FaultPlan:
        """Call C's `abort`."""
        return self._plan("abort")

    def fill_disk(self, path: str) -> FaultPlan:
        """Fill the file system of a folder, which must have less than 1 GiB free: a small tmpfs, say."""
        return self._plan("fill_disk", str(path))

    def allocate(self, size: int) -> FaultPlan:
        """Allocate so many bytes and write to all of them."""
        return self._plan("allocate", size)

    def ignore(self, number: int) -> FaultPlan:
        """Ignore a signal from there on."""
        return self._plan("ignore", _signal(number))

    def nan(self) -> FaultPlan:
        """Make the floating-point numbers of the step's batch NaN, from which loss and gradients follow."""
        return self._plan("nan")

    def flip(self, parameter: str, bit: int = 0) -> FaultPlan:
        """Flip a bit of the first element of a parameter, as a device does that is ill.

        Args:
            parameter: its name in the wrapped model, such as "0.weight".
            bit: from the lowest, 0.
        """
        return self._plan("flip", FlippedBit(parameter, bit))

    def wrong_sums(self) -> FaultPlan:
        """Have the rank's device compute wrong sums in the preflight of `allstep run`."""
        return self._plan("wrong_sums")

    def clock(self, seconds: float) -> FaultPlan:
        """Have the clock of the rank's machine be so far ahead in the preflight of `allstep run`."""
        return self._plan("clock", float(seconds))

    def _plan(self, kind: str, argument: Any = None) -> FaultPlan:
        when = _only_place(kind) if self.when == "step" else self.when
        fault = Fault(kind, argument, self.rank, self.iteration, self.epoch, _span(self.attempt), when)
        return FaultPlan((read_fault(write_fault(fault)),))  # so that what a text cannot say is refused here


def _only_place(kind: str) -> Any:
    """Where a fault strikes that does not say so: in the step, or at the only place of its kind."""
    places = KINDS[kind].whens
    return places[0] if len(places) == 1 else "step"


def _signal(number: int) -> int:
    try:
        return int(signal.Signals(number))
    except ValueError:
        raise ConfigurationError(f"signal is {number!r}; it must be one that this system has, such as 9") from None


def _span(attempts: int | range | None) -> tuple[int, int] | None:
    if isinstance(attempts, range):
        if not attempts or attempts.step != 1:
            raise ConfigurationError(f"attempt is {attempts}; a range must have members and a step of 1")
        return attempts[0], attempts[-1]
    return None if attempts is None else (attempts, attempts)


def read_fault(text: str) -> Fault:
    """Read one fault.

    Raises:
        ConfigurationError: the text is no fault.
    """
    site: dict[str, Any] = {}
    effects: list[tuple[str, Any]] = []
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            if name in _SITE_PARTS:
                if name in site:
                    raise ConfigurationError("it is given twice")
                site[name] = _read_site_part(name, value)
            elif name in KINDS:
                effects.append((name, _read_argument(name, bool(equals), value)))
            else:
                raise ConfigurationError(f"a part is one of {_allowed_parts()}")
        except ConfigurationError as error:  # said below with the part and the fault that it is in
            raise ConfigurationError(f"fault {text.strip()!r}: {part.strip()!r} is wrong: {error}") from None
    if len(effects) != 1:
        found = " and ".join(name for name, _ in effects) or "none"
        raise ConfigurationError(
            f"fault {text.strip()!r} has to say one thing that happens, and says {found}; one of "
            f"{', '.join(kind.example for kind in KINDS.values())}"
        )
    kind, argument = effects[0]
    site.setdefault("when", _only_place(kind))
    try:
        return Fault(kind, argument, attempts=site.pop("attempt", None), **site)
    except ConfigurationError as error:
        raise ConfigurationError(f"fault {text.strip()!r}: {error}") from None


def write_fault(fault: Fault) -> str:
    """The fault as `read_fault` reads it."""
    parts = [] if fault.rank is None else [f"rank={fault.rank}"]
    parts += [f"{name}={getattr(fault, name)}" for name in ("epoch", "iteration") if getattr(fault, name) is not None]
    if fault.attempts is not None:
        first, last = fault.attempts
        parts.append(f"attempt={first}" + (f"-{last}" if last > first else ""))
    if fault.when != "step":  # the default, so that a plan is as short as a person would write it
        parts.append(f"when={fault.when}")
    kind = KINDS[fault.kind]
    return ",".join([*parts, fault.kind + (f"={kind.write(fault.argument)}" if kind.read else "")])


def _read_site_part(name: str, value: str) -> Any:
    if name == "when":
        if value not in WHENS:
            raise ConfigurationError(f"it must be one of {', '.join(WHENS)}")
        return value
    if name == "rank" and value == "all":
        return None  # as where no rank is named
    if name == "attempt" and (span := re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", value)):
        return int(span[1]), int(span[2])
    if not re.fullmatch(r"[0-9]{1,9}", value):
        also = {"rank": ", or all", "attempt": ", or a span of them such as 0-2"}.get(name, "")
        raise ConfigurationError(f"it must be a number{also}")
    return (int(value), int(value)) if name == "attempt" else int(value)


def _read_argument(name: str, is_given: bool, value: str) -> Any:
    kind = KINDS[name]
    if kind.read is None:
        if is_given:
            raise ConfigurationError(f"{name} takes no value")
        return None
    if not is_given:
        raise ConfigurationError(f"it needs a value, as in {kind.example}")
    return kind.read(value)


def _allowed_parts() -> str:
    parts = "rank=N, iteration=N, epoch=N, attempt=N, when=" + "|".join(WHENS)
    return f"{parts}, {', '.join(kind.example for kind in KINDS.values())}"
