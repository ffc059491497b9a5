"""Checks of what a user gives an engine: an error that names the argument, the value and what is expected."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def check_step(step: Callable[..., Any]) -> None:
    """Raise TypeError or ValueError unless a step can be called with (engine, batch)."""
    if not callable(step):
        raise TypeError(f"process_function is {step!r}; it must be a function (engine, batch)")
    try:
        signature = inspect.signature(step)
    except (TypeError, ValueError):  # some builtins tell no signature
        return
    try:
        signature.bind(None, None)
    except TypeError:
        name = getattr(step, "__name__", step)
        raise ValueError(f"process_function is called with (engine, batch), but {name!r} takes {signature}") from None


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
