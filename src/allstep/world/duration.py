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
