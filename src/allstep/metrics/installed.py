"""Computing results from what all ranks have, and leaving each metric as it was.

Contract: inside `installed` the metrics hold the states that are given, know how many batches all ranks have taken, and
compute without reducing anything themselves. Afterwards they hold what they held before, also when `compute` raised, so
that counting goes on. `same_draws` makes a `compute` that draws random numbers (inception score permutes features) draw
the same on every rank, and leaves the generators as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torchmetrics import Metric

from allstep.data.seeding import generators_kept, seed_cpu_generators
from allstep.metrics.bookkeeping import COMPUTING


@contextmanager
def installed(
    metrics: Iterable[Metric], states: Mapping[int, Mapping[str, Any]], updates: Mapping[int, int]
) -> Iterator[None]:
    """Have metrics hold other states for a while.

    Args:
        metrics: all that take part, those inside of others too.
        states: by the metric's id, attributes and their values. Lists and tensors are the callee's to change.
        updates: by the metric's id, how many batches all ranks took.
    """
    before: list[tuple[Metric, dict[str, Any], list[str]]] = []
    try:
        for metric in metrics:
            held = vars(metric)
            new = states.get(id(metric), {})
            names = [*new, *COMPUTING]
            before.append((metric, {n: held[n] for n in names if n in held}, [n for n in names if n not in held]))
            held.update(new)
            count = updates.get(id(metric), metric._update_count)
            held.update(_update_count=count, _computed=None, _to_sync=False, _is_synced=False, _should_unsync=True)
        yield
    finally:
        for metric, kept, absent in reversed(before):
            vars(metric).update(kept)
            for name in absent:
                vars(metric).pop(name, None)


@contextmanager
def same_draws(key: int, device: torch.device) -> Iterator[None]:
    """Seed all generators from a key for a while."""
    with generators_kept():
        seed_cpu_generators(key)
        if device.type != "cuda":
            yield
            return
        drawn = torch.cuda.get_rng_state(device)
        try:
            place = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[place].manual_seed(key >> 1)
            yield
        finally:
            torch.cuda.set_rng_state(drawn, device)


def copied(value: Any) -> Any:
    """A state of its own memory, so that a `compute` that writes to it spoils no other: tensors, and those of lists."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return [copied(each) for each in value] if isinstance(value, list) else value
