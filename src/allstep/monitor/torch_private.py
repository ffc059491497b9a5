"""torch's flight recorders: what they hold of this rank's last collectives.

They have no public interface in Python. Functions of `torch._C._distributed_c10d` read them: `_dump_nccl_trace_json`
NCCL's own (torch 2.5, builds with NCCL) and `_dump_fr_trace_json` that of the other backends (torch 2.8); newer builds
have one recorder behind both. The same names without `_json` give what torch's analyser `torchfrtrace` reads. They are
looked for at each use, and only in a module that is loaded already: a process that has not imported torch has no
collectives. Where all are gone, one warning says that the stacks of a hang come without collectives, and everything
else goes on.

The recorders are on by default and keep the last 2,000 collectives; TORCH_FR_BUFFER_SIZE sets how many, 0 none.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings

_MODULE = "torch._C._distributed_c10d"
_AS_JSON = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
_FOR_THE_ANALYSER = ("_dump_nccl_trace", "_dump_fr_trace")


def dumps_as_json() -> list[bytes]:
    """What each recorder of this process holds, without stack traces; empty without torch or its functions."""
    c10d = sys.modules.get(_MODULE)
    if c10d is None:
        return []
    found = [dump for name in _AS_JSON if (dump := getattr(c10d, name, None)) is not None]
    if not found:
        warn_once()
    held: list[bytes] = []
    for dump in found:
        with contextlib.suppress(Exception):  # it is another's function
            text = dump(True, False)
            held += [text] if text not in held else []
    return held


def dump_for_the_analyser() -> bytes:
    """What the recorder of this process holds, as `torchfrtrace` reads it; empty without one.

    Without stack traces: for the first of them torch imports its compiler, which takes seconds.
    """
    c10d = sys.modules.get(_MODULE)
    for name in _FOR_THE_ANALYSER:
        dump = getattr(c10d, name, None)
        if dump is not None:
            return bytes(dump(True, False, False))
    return b""


@functools.cache
def warn_once() -> None:
    """Say once in a process that the flight recorders cannot be read."""
    # This runs in the thread that sends heartbeats, which has to go on where warnings are turned into errors.
    with contextlib.suppress(RuntimeWarning):
        warnings.warn(
            f"this version of torch has none of {', '.join(_AS_JSON)} in {_MODULE}, so the report of a hang names no "
            "collectives",
            RuntimeWarning,
            stacklevel=3,
        )
