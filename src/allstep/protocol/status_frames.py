"""How a rank's status line, such as a progress bar, comes to whoever shows it, in what the rank writes.

Contract: a rank that finds ALLSTEP_STATUS_LINE in its environment, the number of columns that it has, may write its
line to standard error as a `status_frame`: between two marks, ESC ] allstep ; and BEL, an operating system command that
terminals do not know. `StatusFrames` takes the frames out of what was read, so that they are in no log and no report.
"""

from __future__ import annotations

import re

VARIABLE = "ALLSTEP_STATUS_LINE"

_BEGIN, _END = b"\x1b]allstep;", b"\x07"
_FRAME = re.compile(re.escape(_BEGIN) + rb"([^\x07]*)" + re.escape(_END))
_LONGEST = 1 << 12  # bytes of a frame that are waited for; what is longer is no frame


def status_frame(text: str) -> str:
    """What a rank writes to have its status line say `text`, which has no control characters; empty shows none."""
    return f"{_BEGIN.decode()}{text}{_END.decode()}"


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
