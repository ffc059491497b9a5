"""Which checkpoints are no longer needed: a pure function, asked after a commit and at no other time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from allstep.checkpoint.layout import Name
from allstep.checkpoint.manifest import Manifest
from allstep.errors import CheckpointError

KeepBest = tuple[int, str, Literal["max", "min"]]


@dataclass(frozen=True, slots=True)
class Retention:
    """How many checkpoints stay: the newest, and the best by a metric. None keeps all."""

    keep_last: int | None = 3
    keep_best: KeepBest | None = None

    def __post_init__(self) -> None:
        if self.keep_last is not None and not _is_count(self.keep_last):
            raise CheckpointError(f"keep_last is {self.keep_last!r}; it must be 1 or more, or None to keep all")
        if self.keep_best is not None and not _can_be_meant(self.keep_best):
            raise CheckpointError(
                f'keep_best is {self.keep_best!r}; give (1 or more, the name of a metric, "max" or "min")'
            )

    def expendable(self, committed: Sequence[tuple[Name, Manifest]]) -> list[Name]:
        """Those to remove, oldest first. A missing or NaN metric is never among the best; a tie is the older's."""
        if self.keep_last is None:
            return []
        ordered = sorted(committed, key=lambda entry: entry[0])
        kept = {name for name, _ in ordered[-self.keep_last :]}
        if self.keep_best is not None:
            count, metric, direction = self.keep_best
            sign = 1 if direction == "max" else -1
            rated = [
                (sign * manifest.metrics[metric], name)
                for name, manifest in reversed(ordered)
                if not math.isnan(manifest.metrics.get(metric, math.nan))
            ]
            kept.update(name for _, name in sorted(rated, key=lambda entry: entry[0])[-count:])
        return [name for name, _ in ordered if name not in kept]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _can_be_meant(best: object) -> bool:
    if not isinstance(best, Sequence) or len(best) != 3:
        return False
    count, metric, direction = best
    return _is_count(count) and isinstance(metric, str) and direction in ("max", "min")
