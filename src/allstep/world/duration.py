"""Durations as callers may give them."""

from __future__ import annotations

from datetime import timedelta


def seconds(name: str, value: float | timedelta) -> float:
    """A duration in seconds; raises ValueError, naming the argument, unless it is positive."""
    try:
        result = value.total_seconds() if isinstance(value, timedelta) else float(value)
    except (TypeError, ValueError):
        result = 0.0
    if not result > 0:
        raise ValueError(f"{name} is {value!r}; it must be a positive number of seconds or timedelta")
    return result
