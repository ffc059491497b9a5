"""Forward passes of a module in mixed precision, by hooks on it.

Contract: parameters stay as they are; what torch.autocast casts is computed in 16 bits, and what the module returns is
in float32, so that a loss is. The engine casts for a run (`precision=`), and `World.wrap` for good. Of a
module that is compiled the forward pass is compiled, and these hooks are not.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from allstep.parallel import Precision, autocast, not_compiled
from allstep.world.move import rebuilt


class Casting:
    """One module's forward passes in autocast; they may be nested."""

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        self._module = module
        self._precision = precision
        self._entered: list[AbstractContextManager[object]] = []

    def hook(self) -> tuple[RemovableHandle, RemovableHandle]:
        """Cast from now on, until these are removed."""
        before = self._module.register_forward_pre_hook(self._enter, prepend=True)
        return before, self._module.register_forward_hook(self._leave, always_call=True)

    @not_compiled
    def _enter(self, module: nn.Module, inputs: Any) -> None:
        parameter = next(module.parameters(), None)
        context = autocast("cpu" if parameter is None else parameter.device.type, self._precision)
        context.__enter__()
        self._entered.append(context)

    @not_compiled
    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        self._entered.pop().__exit__(None, None, None)
        return rebuilt(output, _in_float32)


def _in_float32(value: Any) -> Any:
    is_low = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_low else value
