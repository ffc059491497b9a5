"""The bytes that ranks write: cut into lines, prefixed, kept. No encoding is assumed anywhere.

Contract: the supervisor feeds what it reads from a worker's pipe and passes on what comes back. Only whole lines come
back, so lines of different ranks never mix; a carriage return ends a line too, so progress bars work; a line longer
than `LONGEST` comes in pieces. `rest` gives an unfinished last line when the pipe has closed.
"""

from __future__ import annotations

import re

LONGEST = 1 << 20
"""Bytes of an unfinished line that are kept waiting for its end."""

# A carriage return at the very end may be half of "\r\n", so it waits for what follows.
_END = re.compile(rb"\r\n|\n|\r(?!\Z)")

_COLOURS = (36, 33, 32, 35, 34, 31)


class Lines:
    """Cuts a stream of bytes into lines, each given back with `prefix` before it."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._unfinished = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Take `data` and return the lines that are now whole."""
        text = self._unfinished
        searched = max(0, len(text) - 1)  # but for a carriage return that waits, what is kept has no line end
        text += data
        done = []
        begin = 0
        for end in _END.finditer(text, searched):
            line = text[begin : end.end()]
            done.append(line if line == b"\r" else self._prefix + line)
            begin = end.end()
        del text[:begin]
        if len(text) > LONGEST:
            done.append(self._prefix + text + b"\n")
            text.clear()
        return b"".join(done)

    def rest(self) -> bytes:
        """Return the unfinished last line, ended, or nothing."""
        unfinished = bytes(self._unfinished)
        self._unfinished.clear()
        return self._prefix + unfinished + b"\n" if unfinished.strip(b"\r") else b""


class Verbatim:
    """Passes everything on at once and unchanged: for a worker without peers."""

    def feed(self, data: bytes) -> bytes:
        """Return `data`."""
        return data

    def rest(self) -> bytes:
        """Return nothing: nothing is held back."""
        return b""


class Tail:
    """Keeps the last `limit` bytes of a stream."""

    def __init__(self, limit: int = 1 << 16) -> None:
        self._limit = limit
        self._kept = bytearray()

    def feed(self, data: bytes) -> None:
        """Take `data`, forgetting what is now too old."""
        self._kept += data
        del self._kept[: -self._limit]

    def text(self) -> str:
        """Return what is kept, with a replacement character for what is not UTF-8."""
        return self._kept.decode("utf-8", "replace")


def rank_prefix(rank: int, *, colour: bool) -> bytes:
    """Return what stands before each line of a rank, in the rank's colour if asked for."""
    if not colour:
        return b"[%d] " % rank
    return b"\x1b[%dm[%d]\x1b[0m " % (_COLOURS[rank % len(_COLOURS)], rank)
