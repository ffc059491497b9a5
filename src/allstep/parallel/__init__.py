"""A model over several ranks: DDP that follows its changes, bucket layout, waits, buffers, and mixed precision by name.

Everything here is told a device and a world size. What does not live here: the current World, process groups and
collectives (`world`), and gradient accumulation and weights of uneven batches (`engine`).
"""

from typing import TYPE_CHECKING

from allstep.parallel.buffers import broadcasts_buffers, unify_buffers
from allstep.parallel.compilation import Compilations
from allstep.parallel.dtensor import is_dtensor, loss_parallel, whole_tensor
from allstep.parallel.float8 import linears_in_float8
from allstep.parallel.fully_sharded import (
    forget_gradients,
    is_fully_sharded,
    shard_module,
    unreduced,
    without_gradients,
)
from allstep.parallel.gradient_norm import Parameters, clip_gradient_norm, gradient_norm
from allstep.parallel.meta_weights import materialised_later
from allstep.parallel.plain_names import PlainNames
from allstep.parallel.precision import Precision, autocast, grad_scaler
from allstep.parallel.pretrained import LoadedWeights, Rename, load_pretrained
from allstep.parallel.replica import Replica, in_short
from allstep.parallel.torch_private import not_compiled, shard_boxes
from allstep.parallel.units import choose_units
from allstep.parallel.wrap import rewrap, unwrap, wrap_module

if TYPE_CHECKING:
    from allstep.parallel.tensor_parallel import styles_of

__all__ = [
    "Compilations",
    "LoadedWeights",
    "Parameters",
    "PlainNames",
    "Precision",
    "Rename",
    "Replica",
    "autocast",
    "broadcasts_buffers",
    "choose_units",
    "clip_gradient_norm",
    "forget_gradients",
    "grad_scaler",
    "gradient_norm",
    "in_short",
    "is_dtensor",
    "is_fully_sharded",
    "linears_in_float8",
    "load_pretrained",
    "loss_parallel",
    "materialised_later",
    "not_compiled",
    "rewrap",
    "shard_boxes",
    "shard_module",
    "styles_of",
    "unify_buffers",
    "unreduced",
    "unwrap",
    "whole_tensor",
    "without_gradients",
    "wrap_module",
]


def __getattr__(name: str) -> object:
    if name == "styles_of":  # with it DTensor is imported, for which most ranks have no use
        from allstep.parallel.tensor_parallel import styles_of

        return styles_of
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
