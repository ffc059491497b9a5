"""Values by name that handlers read: an engine's results, and what a saved state has.

Contract: pure functions of a mapping. Where a name is missing they raise an error that says which, and the handler has
not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allstep.engine import Engine
from allstep.engine.state import is_one_number
from allstep.errors import ArgumentError


def named_result(handler: object, engine: Engine, name: str) -> float:
    """The result of this name.

    Args:
        handler: that looks at it; the error names its class.
        engine: whose `state.metrics` has it.
        name: of the result.

    Raises:
        ArgumentError: there is none of this name.
    """
    results = engine.state.metrics
    if name not in results:
        raise ArgumentError(
            f"metric is {name!r}, and state.metrics of {engine.name} has {', '.join(results) or 'none'}; give the name "
            f"of one of these, or attach what computes it before {type(handler).__name__}"
        )
    return float(results[name])


def single_numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Those that are single numbers, which waits for the device that they are on."""
    return {name: float(value) for name, value in results.items() if is_one_number(value)}


def saved_values(handler: object, state_dict: Mapping[str, Any], *names: str) -> list[Any]:
    """The values of these names.

    Args:
        handler: that loads them; the error names its class.
        state_dict: what its `state_dict` gave.
        names: all that it needs.

    Raises:
        ArgumentError: some are missing.
    """
    missing = sorted(set(names) - state_dict.keys())
    if missing:
        owner = type(handler).__name__
        raise ArgumentError(f"the state of {owner} lacks {', '.join(missing)}; load what state_dict() gave")
    return [state_dict[name] for name in names]
