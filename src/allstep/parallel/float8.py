"""Linear layers that multiply in float8, by torchao; everything else of such a model is in bfloat16.

Contract: `World.wrap` with `precision="float8"` calls `linears_in_float8` before the module is sharded. Parameters stay
as they are, in float32 and under their names; inputs, weights and gradients are scaled and cast for each
multiplication. A layer whose sizes are no multiples of 16, which the device's float8 needs, stays in bfloat16. Refused
where the device has no float8 or torchao is not installed, before anything is changed. torchao puts another module in
the place of each layer.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from allstep.cuda import compute_capability
from allstep.errors import ParallelError

_MULTIPLE = 16
_CAPABILITY = (8, 9)  # of the first devices of NVIDIA with float8


def linears_in_float8(module: nn.Module, device: torch.device, *, emulated: bool = False) -> dict[nn.Module, nn.Module]:
    """Have a module's linear layers multiply in float8, in place.

    Args:
        module: on any device; itself no linear layer.
        device: where it is to run.
        emulated: round to float8 and multiply in a wider type, which any device does: for tests of accuracy.

    Returns:
        The layers that do, each with the one that it has replaced.

    Raises:
        ParallelError: the device has no float8, torchao is not installed, or no layer can be in float8.
    """
    if not emulated and (lack := _lack(device)):
        raise ParallelError(f'precision is "float8", but {lack}. Use "bf16" here')
    try:
        torchao: Any = importlib.import_module("torchao.float8")
    except ImportError as error:
        raise ParallelError(
            f"precision is \"float8\", which needs torchao: pip install 'allstep[float8]' ({error})"
        ) from error
    layers = {name: each for name, each in module.named_modules() if name and _fits(each)}
    if not layers:
        raise ParallelError(
            'precision is "float8", but no nn.Linear in the module has in_features and out_features that are multiples '
            f'of {_MULTIPLE}. Use "bf16", or change these sizes'
        )
    torchao.convert_to_float8_training(
        module, config=torchao.Float8LinearConfig(emulate=emulated), module_filter_fn=lambda each, _: _fits(each)
    )
    return {module.get_submodule(name): each for name, each in layers.items()}


def _lack(device: torch.device) -> str | None:
    """Why a device cannot multiply in float8; None where it can."""
    if device.type != "cuda":
        return f"the device is {device}: float8 needs an NVIDIA GPU of compute capability 8.9 or later"
    if torch.version.hip is None and (capability := compute_capability(device)) < _CAPABILITY:
        return f"{device} has compute capability {capability[0]}.{capability[1]}, and float8 needs 8.9 or later"
    return None


def _fits(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not (module.in_features % _MULTIPLE or module.out_features % _MULTIPLE)
