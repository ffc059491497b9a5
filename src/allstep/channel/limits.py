"""How long each section of a rank's work may last without progress: a value, and how it is written.

Contract: a limit is learnt: `multiple` times the longest stay in the section that any rank has had so far, but no less
than the section's lower bound and no more than its upper one, which also holds while nothing was seen. Being idle,
between engines, has no limit unless one is given, and neither has startup: a script that trains in a loop of its own is
in startup to its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from allstep.errors import ConfigurationError

MULTIPLE = 10.0

# A run that is ended by mistake costs more than minutes of one that hangs: compiling again, a slow file system.
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "startup": (math.inf, math.inf),
    "data": (300.0, 1800.0),
    "step": (300.0, 1800.0),
    "evaluation": (600.0, 1800.0),
    "checkpoint": (600.0, 3600.0),
    "handler": (600.0, 3600.0),
    "idle": (math.inf, math.inf),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds. `silence` is how long a rank may go without a heartbeat, `link` two nodes without a word."""

    bounds: Mapping[str, tuple[float, float]] = field(default_factory=lambda: _BOUNDS)
    silence: float = 15.0
    link: float = 15.0

    @classmethod
    def parse(cls, text: str) -> Limits:
        """Limits from text like `step=60,data=5:300,silence=15,link=15`; what is not named keeps its default.

        One number bounds a section from above, two bound what is learnt from both sides, and `off` ends the watch.

        Raises:
            ConfigurationError: an unknown name, or not seconds.
        """
        bounds = dict(_BOUNDS)
        single = {"silence": cls().silence, "link": cls().link}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name in bounds:
                bounds[name] = _range(name, value, bounds[name])
            elif name in single:
                single[name] = _seconds(name, value)
            else:
                raise ConfigurationError(
                    f"limits: {part!r} names none of {', '.join((*bounds, *single))}; write step=60,data=300"
                )
        return cls(bounds, **single)

    def of(self, section: str, longest: float | None) -> float:
        """How long a section may last, given the longest stay that was seen (None: none has ended yet)."""
        low, high = self.bounds[section]
        return high if longest is None else min(high, max(low, MULTIPLE * longest))


def _range(name: str, value: str, default: tuple[float, float]) -> tuple[float, float]:
    low, colon, high = value.partition(":")
    if not colon:
        most = _seconds(name, low)
        return min(default[0], most), most
    bounds = _seconds(name, low), _seconds(name, high)
    if bounds[0] > bounds[1]:
        raise ConfigurationError(f"limits: {name}={value} has a lower bound above the upper one; swap them")
    return bounds


def _seconds(name: str, value: str) -> float:
    if value == "off":
        return math.inf
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ConfigurationError(f"limits: {name}={value!r} must be seconds above 0, two of them as LOW:HIGH, or off")
    return seconds
