"""Mixed precision by name.

Contract: supervised trainers and users' steps ask for `"no"`, `"fp16"` or `"bf16"`; this module turns the name into
torch's autocast context and gradient scaler. `"no"` changes nothing, not even an autocast that the caller set up.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

from allstep.errors import ParallelError
from allstep.parallel.gradient_scaler import MeshGradScaler

Precision = Literal["no", "fp16", "bf16"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device_type: str, precision: Precision) -> AbstractContextManager[object]:
    """Context for one forward pass and its loss in a precision; make a new one for each step.

    Args:
        device_type: where the model runs, such as `world.device.type`.
        precision: `"no"` (do nothing), `"fp16"` or `"bf16"`.

    Raises:
        ParallelError: an unknown precision, or "fp16" on XLA, where nothing scales a loss.
    """
    _check(precision)
    if precision == "no":
        return nullcontext()
    if precision == "fp16" and device_type == "xla":
        raise ParallelError('precision is "fp16", for which torch has no loss scaler on XLA; give "bf16"')
    return torch.autocast(device_type, dtype=_DTYPES[precision])


def grad_scaler(device_type: str, precision: Precision) -> torch.amp.GradScaler:
    """Loss scaler that a precision needs: at work for `"fp16"`, one that changes nothing otherwise.

    Its `scale(loss)`, `unscale_(optimizer)`, `step(optimizer)` and `update()` can be called in every precision, so that
    a step is written once.

    Raises:
        ParallelError: an unknown precision.
    """
    _check(precision)
    return MeshGradScaler(device_type, enabled=precision == "fp16")


def _check(precision: str) -> None:
    if precision not in get_args(Precision):
        raise ParallelError(f'precision is {precision!r}; it must be one of "no", "fp16", "bf16"')
