"""What a folder's file system does, tried out; run by its path as a process of its own, which may hang and be killed.

Contract: called with a folder that is not there yet; its parent is what is looked at. Before each step a line names it,
after it a line of JSON says what came of it, so that who reads knows at which step a file server fell silent. The
folder is removed at the end. Standard library only: the environment's own disk may be the one that is ill.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable

_BLOCK = 1 << 20
_FIRST = 8  # blocks
_MOST = 64
_SOON_S = 0.3


def create(folder: str) -> dict[str, object]:
    """Make the folder and a file in it; how far the time that the file gets is from this machine's."""
    os.mkdir(folder, 0o700)
    before = time.time()
    with open(os.path.join(folder, "first"), "wb") as file:
        file.write(b"first")
    after = time.time()
    written = os.stat(os.path.join(folder, "first")).st_mtime
    # What lies between the two looks at the clock is as it should be; the kernel's own grain is some milliseconds.
    return {"ahead": max(0.0, written - after) or min(0.0, written - before + 0.05)}


def replace(folder: str) -> dict[str, object]:
    """Rename a file over another, which every save does at its end."""
    first, second = os.path.join(folder, "first"), os.path.join(folder, "second")
    with open(second, "wb") as file:
        file.write(b"second")
    os.replace(second, first)
    with open(first, "rb") as file:
        return {"works": file.read() == b"second" and not os.path.exists(second)}


def exclusive(folder: str) -> dict[str, object]:
    """Create a file twice; the second time must fail, by which jobs know whose a folder of checkpoints is."""
    for _ in range(2):
        try:
            os.close(os.open(os.path.join(folder, "owner"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return {"works": True}
    return {"works": False}


def lock(folder: str) -> dict[str, object]:
    """Hold a lock while another process tries to take it."""
    with open(os.path.join(folder, "lock"), "wb") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child = os.fork()
        if child == 0:
            status = 2
            with contextlib.suppress(OSError), open(os.path.join(folder, "lock"), "wb") as same:
                try:
                    fcntl.lockf(same, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    status = 1
                except (BlockingIOError, PermissionError):
                    status = 0
            os._exit(status)
        return {"works": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0}


def sync(folder: str) -> dict[str, object]:
    """Have a small file written through to the disk."""
    began = time.monotonic()
    with open(os.path.join(folder, "small"), "wb") as file:
        file.write(b"small")
        file.flush()
        os.fsync(file.fileno())
    return {"seconds": time.monotonic() - began}


def write(folder: str) -> dict[str, object]:
    """Write some megabytes through to the disk: few first, and more where that was quick."""
    block = os.urandom(_BLOCK)  # which no file system can compress
    began = time.monotonic()
    written = 0
    with open(os.path.join(folder, "large"), "wb", buffering=0) as file:
        for blocks in (_FIRST, _MOST - _FIRST):
            for _ in range(blocks):
                written += file.write(block)
            os.fsync(file.fileno())
            if time.monotonic() - began > _SOON_S:
                break
    return {"bytes": written, "seconds": time.monotonic() - began}


def remove(folder: str) -> dict[str, object]:
    """Leave nothing behind."""
    shutil.rmtree(folder)
    return {"works": True}


STEPS: tuple[Callable[[str], dict[str, object]], ...] = (create, replace, exclusive, lock, sync, write, remove)


def main(folder: str) -> None:
    """Take all steps, and remove the folder whatever came of them."""
    for step in STEPS:
        print(step.__name__, flush=True)
        try:
            result = step(folder)
        except OSError as error:
            result = {"error": error.strerror or str(error), "errno": error.errno}
        print(json.dumps(result), flush=True)
        if "error" in result and step is create:
            break
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
