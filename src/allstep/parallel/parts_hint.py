"""What to say of an exception that comes of parameters in parts, in whose text torch names DTensors or FSDP alone.

Contract: a pure function of an exception and its traceback. torch's own error names an operation, and not the optimizer
that called it, nor the method of the model that was called past its forward pass.
"""

from __future__ import annotations

from traceback import walk_tb
from types import FrameType

import torch
from torch import nn

from allstep.parallel.dtensor import is_dtensor
from allstep.parallel.fully_sharded import is_fully_sharded

_MIXED = "mixed torch.Tensor and DTensor"  # in torch's error about an operation on a part and a whole tensor
_NOT_ROOT = "requires running forward through the root module first"
_REGISTER = (
    "A model in parts is whole in its forward pass alone; have it so in another method too, behind world.wrap: "
    "torch.distributed.fsdp.register_fsdp_forward_method(model, {!r})"
)
_CALLS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")


def parts_hint(error: BaseException) -> str | None:
    """A sentence for an exception that came out of computing with parameters in parts; None for any other."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    for frame in frames:
        stepping = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(stepping, torch.optim.Optimizer):
            return _of_optimizer(stepping)
    if _NOT_ROOT in str(error):
        return (
            "a unit of the model ran before the model as a whole did, in a method of it, say, that is not its forward "
            f"pass. {_REGISTER.format('NAME')}"
        )
    return _of_mixed(frames) if _MIXED in str(error) else None


def _of_optimizer(stepping: torch.optim.Optimizer) -> str | None:
    parameters = [each for group in stepping.param_groups for each in group["params"]]
    in_parts = sum(map(is_dtensor, parameters))
    if not in_parts:
        return None
    name = type(stepping).__name__
    if in_parts < len(parameters):
        return (
            f"{name} was stepping parameters in parts (DTensors) and whole ones together; give it those in a group "
            "of their own, or foreach=False"
        )
    return (
        f"{name} was stepping parameters in parts (DTensors), which not every optimizer can; of torch's, AdamW, "
        "SGD and others can, as docs/howto/meshes.md lists"
    )


def _of_mixed(frames: list[FrameType]) -> str:
    called: list[object] = []
    for frame in frames:
        owner, name = frame.f_locals.get("self"), frame.f_code.co_name
        if not isinstance(owner, nn.Module) or not is_fully_sharded(owner):
            continue
        if name in _CALLS:
            called.append(owner)
        elif not any(owner is each for each in called) and hasattr(type(owner), name):
            kind = type(owner).__name__
            return f"{kind}.{name} computed with parameters in parts. {_REGISTER.format(name)}"
    if called:
        return (
            "a parameter in parts (a DTensor) was computed with inside of the model's forward pass, but not in that of "
            "the unit which holds it; give units= that leave out submodules whose parameters others compute with"
        )
    return (
        "a parameter in parts (a DTensor) was computed with outside of its model's forward pass, together with a whole "
        "tensor; allstep.parallel.whole_tensor(parameter) gives all of it, on all ranks together"
    )
