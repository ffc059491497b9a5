"""The line at the bottom of the supervisor's terminal that a rank keeps up to date, such as a progress bar.

Contract: a rank says it by `allstep.protocol.status_frames`. A `StatusLine` is shown on a terminal: it is erased before
anything else is shown, and drawn again below. What is shown last without an end of its line, such as a debugger's
prompt, keeps it away.

What can go wrong: a line that is wider than the terminal has become is cut.
"""

from __future__ import annotations

import os

_ERASE = b"\r\x1b[K"


class StatusLine:
    """One line on a terminal, below all else.

    Args:
        fd: a descriptor of the terminal, which is asked how wide it is.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._text = b""
        self._is_drawn = False
        self._at_line_start = True

    @property
    def columns(self) -> int:
        """How wide it may be. The last column stays free, since some terminals go on to the next line with it."""
        try:
            known = os.get_terminal_size(self._fd).columns
        except OSError:
            known = 0
        return (known or 80) - 1  # a terminal that nobody gave a size says 0

    def around(self, data: bytes) -> bytes:
        """Return what to write so that `data` stands above the line."""
        if not data:
            return b""
        erase = _ERASE if self._is_drawn else b""
        self._at_line_start = data.endswith((b"\n", b"\r"))
        return erase + data + self._drawn()

    def show(self, text: bytes) -> bytes:
        """Return what to write so that the line says this; nothing takes the line away."""
        erase = _ERASE if self._is_drawn else b""
        self._text = text
        return erase + self._drawn()

    def _drawn(self) -> bytes:
        self._is_drawn = bool(self._text) and self._at_line_start
        if not self._is_drawn:
            return b""
        shown = self._text.decode("utf-8", "replace")
        return "".join(each if each.isprintable() else " " for each in shown)[: self.columns].encode()
