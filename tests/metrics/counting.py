"""Counting the collectives of a process, and its messages to other ranks: those that Python asks for, and all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

_NAMES = ("all_gather", "all_reduce", "broadcast", "barrier", "gather", "reduce")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each collective is called inside."""
    calls: Counter[str] = Counter()

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return call(*args, **kwargs)

        return count

    send = dist.ProcessGroup.send

    def count_sent(group: dist.ProcessGroup, tensors: list[torch.Tensor], target: int, tag: int) -> dist.Work:
        # Messages that a rank sends to all others at once are one exchange; that to the next rank stands for it.
        calls["send"] += target == (group.rank() + 1) % group.size()
        return send(group, tensors, target, tag)

    with ExitStack() as stack:
        stack.enter_context(patch.object(dist.ProcessGroup, "send", count_sent))
        for name in _NAMES:
            for module in (dist, dist.distributed_c10d):
                stack.enter_context(patch.object(module, name, counting(name, getattr(module, name))))
        yield calls


def begun() -> int:
    """Collectives that the default group has begun, by its own count: those that DDP asks for in C++ are among them."""
    if not dist.is_initialized():
        return 0
    number: int = dist.distributed_c10d._get_default_group()._get_sequence_number_for_group()
    return number
