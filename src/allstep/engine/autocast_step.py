"""The step with the forward passes of its modules in mixed precision, as `Engine(precision=...)` asks for.

Contract: while the step runs, each forward pass of a module that it trains is in torch's autocast, and gives what it
returns on in float32, so that a loss outside of it is computed in full precision. Forward passes outside of the step,
such as those of an evaluator in a handler, are left alone, and so are backward passes and optimizers. Autocast round
the whole step would cast these too, and would keep casts of weights from before an optimizer's step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allstep.parallel import Precision, autocast
from allstep.world.move import rebuilt


def step_in_precision(
    step: Callable[[Any], Any], precision: Precision, modules: Sequence[nn.Module]
) -> Callable[[Any], Any]:
    """The step with forward passes of `modules` in a precision."""
    # Inside DDP and not inside a compiled module: its hooks would be compiled as well.
    inner = [each.module if isinstance(each, DistributedDataParallel) else each for each in modules]

    def in_precision(batch: Any) -> Any:
        with ExitStack() as hooks:
            for module in inner:
                _Casting(module, precision).hook(hooks)
            return step(batch)

    return in_precision


class _Casting:
    """One module's forward passes in autocast; they may be nested."""

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        self._module = module
        self._precision = precision
        self._entered: list[AbstractContextManager[object]] = []

    def hook(self, stack: ExitStack) -> None:
        """Cast until the stack is closed."""
        before = self._module.register_forward_pre_hook(self._enter, prepend=True)
        after = self._module.register_forward_hook(self._leave, always_call=True)
        for handle in (before, after):
            stack.callback(handle.remove)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        parameter = next(module.parameters(), None)
        context = autocast("cpu" if parameter is None else parameter.device.type, self._precision)
        context.__enter__()
        self._entered.append(context)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        self._entered.pop().__exit__(None, None, None)
        return rebuilt(output, _in_float32)


def _in_float32(value: Any) -> Any:
    is_low = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_low else value
