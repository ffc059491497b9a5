"""The line at the bottom of the supervisor's terminal that a rank keeps up to date, such as a progress bar.

Contract: a worker that finds ALLSTEP_STATUS_LINE in its environment, the number of columns that it has, may write its
line to standard error between two marks, ESC ] allstep ; and BEL. `StatusFrames` takes these out of what was read, so
that they are in no log and no report. A `StatusLine` is shown on a terminal: it is erased before anything else is
shown, and drawn again below. What is shown last without an end of its line, such as a debugger's prompt, keeps it away.

What can go wrong: a line that is wider than the terminal has become is cut.
"""

from __future__ import annotations

import os
import re

VARIABLE = "ALLSTEP_STATUS_LINE"

_BEGIN, _END = b"\x1b]allstep;", b"\x07"
_FRAME = re.compile(re.escape(_BEGIN) + rb"([^\x07]*)" + re.escape(_END))
_LONGEST = 1 << 12  # bytes of a frame that are waited for; what is longer is no frame
_ERASE = b"\r\x1b[K"


class StatusFrames:
    """Takes status lines out of what one worker writes."""

    def __init__(self) -> None:
        self._unfinished = b""

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Return what is no status line, and the last one that `data` brought; None where it brought none."""
        if not self._unfinished and b"\x1b" not in data:  # nearly always
            return data, None
        data, self._unfinished = self._unfinished + data, b""
        frames = _FRAME.findall(data)
        rest = _FRAME.sub(b"", data)
        at = _unfinished_at(rest)
        if at is not None and len(rest) - at < _LONGEST:
            rest, self._unfinished = rest[:at], rest[at:]
        return rest, frames[-1] if frames else None

    def rest(self) -> bytes:
        """Return what waited for the end of a frame that never came."""
        rest, self._unfinished = self._unfinished, b""
        return rest


def _unfinished_at(data: bytes) -> int | None:
    """Where a frame begins that has not ended; None where none does."""
    whole = data.rfind(_BEGIN)
    if whole >= 0:
        return whole
    # The reading may have ended inside of the mark.
    return next((len(data) - n for n in range(len(_BEGIN) - 1, 0, -1) if data.endswith(_BEGIN[:n])), None)


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
