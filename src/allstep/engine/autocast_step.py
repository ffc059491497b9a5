"""The step with the forward passes of its modules in mixed precision, as `Engine(precision=...)` asks for.

Contract: while the step runs, each forward pass of a module that it trains is in torch's autocast, and gives what it
returns on in float32, so that a loss outside of it is computed in full precision. Forward passes outside of the step,
such as those of an evaluator in a handler, are left alone, and so are backward passes and optimizers. Autocast round
the whole step would cast these too, and would keep casts of weights from before an optimizer's step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allstep.parallel import Precision
from allstep.world.casting import Casting


def step_in_precision(
    step: Callable[[Any], Any], precision: Precision, modules: Sequence[nn.Module]
) -> Callable[[Any], Any]:
    """The step with forward passes of `modules` in a precision."""
    # Inside DDP and not inside a compiled module: its hooks would be compiled as well.
    inner = [each.module if isinstance(each, DistributedDataParallel) else each for each in modules]

    def in_precision(batch: Any) -> Any:
        with ExitStack() as hooks:
            for module in inner:
                for handle in Casting(module, precision).hook():
                    hooks.callback(handle.remove)
            return step(batch)

    return in_precision
