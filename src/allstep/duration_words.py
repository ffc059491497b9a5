"""Durations as a person says them."""

from __future__ import annotations


def took_in_words(taken: float) -> str:
    """A number of seconds in words, such as "4.2 s", "3 min 20 s", "2 h 5 min" or "3 d 4 h"."""
    if taken < 60:
        return f"{taken:.1f} s"
    minutes, rest = divmod(round(taken), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
