"""How a model spans ranks: DDP wrapping and mixed precision. Takes devices and sizes, never looks at the World."""

from allstep.parallel.precision import Precision, autocast, grad_scaler
from allstep.parallel.wrap import unwrap, wrap_module

__all__ = ["Precision", "autocast", "grad_scaler", "unwrap", "wrap_module"]
