"""The numbers that a checkpoint is rated by, out of an engine's metrics, and back.

Contract: pure functions, asked by `Checkpoint`. Metrics are numbers of any library; everything else is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from allstep.checkpoint.store import Loaded


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among metrics."""
    return {name: float(value) for name, value in metrics.items() if _is_number(value)}


def metrics_of(loaded: Loaded, rank: int) -> dict[str, float]:
    """What a rank had measured at a save, be it of that place or of the epoch before; rank 0's for a rank more."""
    states = loaded.per_rank
    own = states[rank if rank < len(states) else 0] if states else None
    before = dict(own.get("metrics", {})) if isinstance(own, Mapping) else {}
    return {**before, **loaded.manifest.metrics}


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) or (isinstance(value, np.generic | np.ndarray) and value.size == 1)
