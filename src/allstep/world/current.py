"""The current World: the one piece of global state, set and cleared in this file only.

Contract: `allstep.init` installs the World it made, `World.close` removes it, and anyone may ask which it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from allstep.world.world import World

_current: World | None = None


def install(world: World) -> None:
    """Make a World the current one."""
    global _current
    _current = world


def remove(world: World) -> None:
    """Clear the current World, if it is this one."""
    global _current
    if _current is world:
        _current = None


def current() -> World | None:
    """The World that is open, or None."""
    return _current
