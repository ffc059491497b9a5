"""Writing the failure report where its readers find the whole of it or nothing.

The launcher's head and each sidecar write one `failure.json` per attempt that failed. The machine may go down at any
moment of that, since something has just failed on it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path


def write_report(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON so that a reader finds the whole of it or nothing. Who may read it follows from the umask.

    Raises:
        OSError: the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
