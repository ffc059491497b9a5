"""The file in which a rank's stacks are when the rank itself cannot answer: written by `faulthandler`'s timer."""

from __future__ import annotations

import os

_LARGEST = 256 << 10


def read_stacks(path: str) -> str:
    """The last stacks in a rank's file; empty where there are none, or no file."""
    if not path:
        return ""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _LARGEST))
            return file.read(_LARGEST).decode(errors="replace")
    except OSError:
        return ""
