"""A model over several ranks: DDP wrapping, its bucket layout and the time it waits, and mixed precision by name.

Everything here is told a device and a world size. What does not live here: the current World, process groups and
collectives (`world`), and gradient accumulation and weights of uneven batches (`engine`).
"""

from allstep.parallel.precision import Precision, autocast, grad_scaler
from allstep.parallel.wrap import unwrap, wrap_module

__all__ = ["Precision", "autocast", "grad_scaler", "unwrap", "wrap_module"]
