"""Files of a run that only its user may read: JSON that is whole or not there, and lines of JSON that are added.

Contract: several processes write into a run's folder, one of them to each file, and any of them may be killed, or its
disk be full, at any moment. `write_private_json` replaces a file at once or not at all. `append_line` adds one line in
one write; where the one before it was cut, the new one begins on a line of its own. `read_lines` gives every line that
is whole, and leaves the others out.

What can go wrong: a file cannot be written, which is an OSError for the caller to weigh. Reading raises nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def open_private(path: str | os.PathLike[str], flags: int) -> int:
    """An `opener` for `open`: a file that it makes is readable by this user alone."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def write_private_json(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON so that a reader finds the whole of it or nothing. Only this user may read it.

    Raises:
        OSError: the folder cannot be written to.
    """
    write_whole(path, json.dumps(content, indent=1).encode() + b"\n")


def write_whole(path: Path, data: bytes) -> None:
    """Give a file this content at once; raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with open(temporary, "xb", opener=open_private) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def append_line(path: str | os.PathLike[str], content: Mapping[str, object], *, sync: bool = False) -> int:
    """Add a line of JSON, and return how long the file is then; raises OSError.

    Args:
        path: the file, which is made where it is not there.
        content: what JSON can carry.
        sync: return when the line is on the disk.
    """
    line = json.dumps(content) + "\n"
    with open(path, "ab+", buffering=0, opener=open_private) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(line.encode())
        if sync:
            os.fsync(file.fileno())
    return end + len(line)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole, each a mapping, oldest first; none where the file is not there or cannot be read."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # cut by a kill or a full disk
            content = json.loads(line)
            if isinstance(content, dict):
                found.append(content)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """What a file of JSON says; empty where it is not there or is no mapping."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    return {}
