"""Durations that a caller gives as seconds or as a timedelta."""

from __future__ import annotations

from datetime import timedelta

from allstep.errors import ArgumentError


def seconds(name: str, value: float | timedelta) -> float:
    """A duration in seconds.

    Args:
        name: of the argument, for the message.
        value: seconds, or a timedelta.

    Raises:
        ArgumentError: it is no positive duration.
    """
    try:
        result = value.total_seconds() if isinstance(value, timedelta) else float(value)
    except (TypeError, ValueError):
        result = 0.0
    if not result > 0:
        raise ArgumentError(f"{name} is {value!r}; it must be a positive number of seconds or timedelta")
    return result


def took_in_words(taken: float) -> str:
    """A number of seconds as a person says it, such as "4.2 s", "3 min 20 s" or "2 h 5 min"."""
    if taken < 60:
        return f"{taken:.1f} s"
    minutes, rest = divmod(round(taken), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
