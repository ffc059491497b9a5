"""Names that torch does not promise to keep, for `coordination`: each tested for, and done without.

Contract: no other module of this package uses a private name of torch. Both names are looked up when they are used, and
were there before torch 2.9, the oldest that allstep supports.

| name | what for | without it |
| --- | --- | --- |
| torch.autograd._profiler_enabled | whether a profiler runs in this thread | votes are in its trace |
| torch.autograd._enable_record_function | keeping a vote out of a profiler's trace | the same |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def unrecorded(start: Callable[[], T]) -> T:
    """Start asynchronous work on a gloo group in such a way that no profiler of this thread records it.

    A gloo group tells the profiler of a collective's end from a thread of its own, also when that profiler has stopped
    meanwhile: it then writes to memory that was given back (torch 2.9 to 2.13), and the process aborts at some later
    time. A vote is under way across iterations, and so across a profiler's end.
    """
    is_profiled = getattr(torch.autograd, "_profiler_enabled", None)
    record = getattr(torch.autograd, "_enable_record_function", None)
    if is_profiled is None or record is None or not is_profiled():
        return start()
    record(False)
    try:
        return start()
    finally:
        record(True)
