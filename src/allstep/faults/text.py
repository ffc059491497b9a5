"""A fault as text: `rank=1,iteration=7,kill=9`; pure, both ways.

Contract: `read_fault(write_fault(fault)) == fault`. A text that cannot be meant raises one ConfigurationError, which
names the part that is wrong and what is allowed there. In a message or path `,`, `;`, `=` and `%` are written `%2C`,
`%3B`, `%3D` and `%25`.
"""

from __future__ import annotations

import re
from typing import Any

from allstep.errors import ConfigurationError
from allstep.faults.fault import WHENS, Fault
from allstep.faults.kinds import KINDS

_PLACES = ("rank", "iteration", "epoch", "attempt", "when")


def read_fault(text: str) -> Fault:
    """Read one fault.

    Raises:
        ConfigurationError: the text is no fault.
    """
    place: dict[str, Any] = {}
    acts: list[tuple[str, Any]] = []
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            if name in _PLACES:
                if name in place:
                    raise ConfigurationError("it is given twice")
                place[name] = _read_place(name, value)
            elif name in KINDS:
                acts.append((name, _read_argument(name, bool(equals), value)))
            else:
                raise ConfigurationError(f"a part is one of {_forms()}")
        except ConfigurationError as error:
            raise ConfigurationError(f"fault {text.strip()!r}: {part.strip()!r} is wrong: {error}") from None
    if len(acts) != 1:
        found = " and ".join(name for name, _ in acts) or "none"
        raise ConfigurationError(
            f"fault {text.strip()!r} has to say one thing that happens, and says {found}; one of "
            f"{', '.join(kind.example for kind in KINDS.values())}"
        )
    kind, argument = acts[0]
    try:
        return Fault(kind, argument, attempts=place.pop("attempt", None), **place)
    except ConfigurationError as error:
        raise ConfigurationError(f"fault {text.strip()!r}: {error}") from None


def write_fault(fault: Fault) -> str:
    """The fault as `read_fault` reads it."""
    parts = [] if fault.rank is None else [f"rank={fault.rank}"]
    parts += [f"{name}={getattr(fault, name)}" for name in ("epoch", "iteration") if getattr(fault, name) is not None]
    if fault.attempts is not None:
        first, last = fault.attempts
        parts.append(f"attempt={first}" + (f"-{last}" if last > first else ""))
    if fault.when != "step":
        parts.append(f"when={fault.when}")
    kind = KINDS[fault.kind]
    return ",".join([*parts, fault.kind + (f"={kind.write(fault.argument)}" if kind.read else "")])


def _read_place(name: str, value: str) -> Any:
    if name == "when":
        if value not in WHENS:
            raise ConfigurationError(f"it must be one of {', '.join(WHENS)}")
        return value
    if name == "rank" and value == "all":
        return None
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


def _forms() -> str:
    places = "rank=N, iteration=N, epoch=N, attempt=N, when=" + "|".join(WHENS)
    return f"{places}, {', '.join(kind.example for kind in KINDS.values())}"
