"""What allstep logs is seen on the main rank, also where a script has not configured logging.

Contract: `init` calls `show_log` for a World, and the World calls what it returns when it closes. In between the logger
"allstep" shows INFO on the main rank, and warnings on all, on standard error. As soon as the script has handlers of its
own, at the root logger or at "allstep", ours is silent and levels are the script's: nothing comes twice. Only a level
that nobody has set is changed, and it is put back.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

_LOGGER = logging.getLogger("allstep")


class _LastResort(logging.StreamHandler):  # type: ignore[type-arg]
    """Shows records where nobody else does."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers or _LOGGER.handlers != [self]:
            _LOGGER.setLevel(logging.NOTSET)  # the script's own levels hold from now on
            return
        self.stream = sys.stderr  # the present one, which a notebook or a test replaces
        super().emit(record)


def show_log(*, is_main: bool) -> Callable[[], None]:
    """Show what is logged until the function that is returned is called."""
    root = logging.getLogger()
    if _LOGGER.handlers or root.handlers or _LOGGER.level != logging.NOTSET:
        return lambda: None
    handler = _LastResort()
    handler.setFormatter(logging.Formatter("allstep: %(message)s"))
    _LOGGER.addHandler(handler)
    if is_main:
        _LOGGER.setLevel(logging.INFO)

    def hide() -> None:
        _LOGGER.removeHandler(handler)
        if _LOGGER.level == logging.INFO and is_main:
            _LOGGER.setLevel(logging.NOTSET)

    return hide
