"""The current World: the one piece of global state, set and cleared in this file only.

Contract: `allstep.init` installs the World it made, closing it removes it, and `World.current` asks for it. This module
does not know what a World is, so that the module that defines it can import this one.
"""

from __future__ import annotations

import sys

_current: object | None = None


def install(world: object) -> None:
    """Make a World the current one."""
    global _current
    _current = world


def remove(world: object) -> None:
    """Clear the current World, if it is this one."""
    global _current
    if _current is world:
        _current = None


def current() -> object | None:
    """The World that is open, or None."""
    return _current


def is_interactive() -> bool:
    """Whether a person types lines or runs cells here, so that a World may be left open by what was run before.

    A notebook is known by its running shell, since a library may import IPython or ipykernel in any script.
    """
    return hasattr(sys, "ps1") or running_shell() is not None


def running_shell() -> object | None:
    """The IPython shell that runs this process, which in a notebook has a `kernel`; None where none does."""
    return getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
