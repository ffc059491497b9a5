"""What a handler reads back of a saved state: the values that it needs, or an error that names what is missing.

Contract: a pure function of a mapping; nothing of the handler has changed when it raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allstep.errors import ArgumentError


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
