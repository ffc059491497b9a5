"""Imported by every Python process of a walk: writes down each function of allstep when it is first entered.

Contract: `benchmarks/structure.py` puts this folder on PYTHONPATH and names in STRUCTURE_TRACE the folder to write to.
One file a process and thread, one line a function, in the order of their first calls, each written at once: a process
of a walk may be killed.
"""

from __future__ import annotations

import os
import sys
import threading
from types import CodeType, FrameType

_FOLDER = os.environ.get("STRUCTURE_TRACE", "")
_seen: set[CodeType] = set()
_files: dict[tuple[int, int], int] = {}
_first = [os.getpid()]


def _enter(frame: FrameType, event: str, _: object) -> None:
    code = frame.f_code
    if code in _seen or event != "call":
        return
    if os.getpid() != _first[0]:  # a fork: what it enters is its own
        _first[0] = os.getpid()
        _seen.clear()
    _seen.add(code)
    at = code.co_filename.rfind("/src/allstep/")
    if at < 0 or "/allstep/testing/" in code.co_filename or code.co_name == "<module>":
        return
    key = (os.getpid(), threading.get_native_id())
    if key not in _files:
        path = os.path.join(_FOLDER, f"{key[0]:08d}-{key[1]:08d}")
        _files[key] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(_files[key], f"{code.co_filename[at + 13 :]}\t{code.co_qualname}\n".encode())


if _FOLDER:
    threading.settrace(_enter)
    sys.settrace(_enter)
