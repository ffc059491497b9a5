"""What a user gives an engine, and its checks: an error that names the argument, the value and what is expected."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from allstep.coordination import POLICIES, Uneven
from allstep.engine.filters import is_count


@dataclass(frozen=True, slots=True)
class RunArguments:
    """What `Engine.run` was asked for besides the data; ranks compare all of it. See there."""

    max_epochs: int | None
    max_iters: int | None
    epoch_length: int | None
    uneven: Uneven
    window: int | None
    lookahead: int | None


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


def check_accumulation(modules: Iterable[nn.Module], group_size: int) -> None:
    """Raise ValueError when gradients cannot be added up over the iterations of a group before they are reduced."""
    if group_size > 1 and any(getattr(module, "static_graph", False) for module in modules):
        raise ValueError(
            f"gradients are accumulated over {group_size} iterations, and a module is in DDP with static_graph=True, "
            "which reduces them in every backward pass; wrap it without static_graph, or do not accumulate"
        )


def check_agreement(uneven: str, window: int | None, lookahead: int | None, group_size: int) -> None:
    """Raise ValueError unless ranks can agree in this way; with several, called when all are known to say the same."""
    check_choice("uneven", uneven, POLICIES)
    if window is not None and not is_count(window, least=1):
        raise ValueError(f"window is {window!r}; it must be an int of at least 1")
    if lookahead is not None and not is_count(lookahead, least=group_size):
        raise ValueError(
            f"lookahead is {lookahead!r}; it must be an int of at least {group_size}, one accumulation group"
        )
