"""A model over several ranks: DDP that follows its changes, bucket layout, waits, buffers, and mixed precision by name.

Everything here is told a device and a world size. What does not live here: the current World, process groups and
collectives (`world`), and gradient accumulation and weights of uneven batches (`engine`).
"""

from allstep.parallel.buffers import broadcasts_buffers, unify_buffers
from allstep.parallel.precision import Precision, autocast, grad_scaler
from allstep.parallel.replica import Replica, in_short
from allstep.parallel.wrap import rewrap, unwrap, wrap_module

__all__ = [
    "Precision",
    "Replica",
    "autocast",
    "broadcasts_buffers",
    "grad_scaler",
    "in_short",
    "rewrap",
    "unify_buffers",
    "unwrap",
    "wrap_module",
]
