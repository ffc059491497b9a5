"""A DDP bucket layout that is fixed before the first iteration, so that a resumed run adds in the same order.

Contract: `wrap_module` calls `fix_buckets` on every rank with a DDP module that has never run. DDP lays its parameters
out in buckets when it is made, and once more, in the order in which gradients came, before its second forward pass.
Another layout sums in another order: with three ranks or more the same gradients then differ in their last bits. A
resumed run begins in the first layout again, and so would part from the one that was not interrupted. After this call
the second layout holds from the first iteration on, and it is a function of the module alone. It costs one all-reduce
of the gradients' size.

It leaves no trace: the module is not called, so its hooks, buffers and random generators are as they were, and so are
gradients. Where it cannot be done DDP is left as it is: static_graph and mixed_precision learn from the first pass,
sparse gradients cannot be made up here, and torch may lack what this needs (`torch_private`). find_unused_parameters
never lays out anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allstep.parallel.torch_private import can_rebuild_buckets, rebuild_buckets


def fix_buckets(ddp: DistributedDataParallel) -> bool:
    """Settle the layout of DDP's buckets; whether it could be done. Collective."""
    if ddp.find_unused_parameters and not ddp.static_graph:
        return True
    if ddp.static_graph or ddp.mixed_precision is not None or sparse_layer(ddp.module):
        return False
    if not can_rebuild_buckets(ddp):
        return False
    ignored = ddp.parameters_to_ignore
    parameters = [each for name, each in ddp.module.named_parameters() if each.requires_grad and name not in ignored]
    # Copies, since a gradient may be a view of a bucket already.
    gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    module = ddp.module
    ddp.module = _Placeholder(parameters)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            torch.autograd.backward(*_forward(ddp))
        rebuild_buckets(ddp)
    finally:
        ddp.module = module
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    return True


class _Placeholder(nn.Module):
    """In the module's place: returns each parameter once, and nothing that depends on its value."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        # Not as attributes of the module, which would register them under other names.
        self.__dict__["parameters_given"] = parameters

    def forward(self, _: torch.Tensor) -> list[torch.Tensor]:
        return [parameter.view_as(parameter) for parameter in self.__dict__["parameters_given"]]


def _forward(ddp: DistributedDataParallel) -> tuple[Any, list[torch.Tensor]]:
    """DDP's forward pass, not its hooks, and a gradient of zero for each output."""
    argument = torch.zeros(1)  # DDP for a device expects an argument that it can move there
    ddp.require_forward_param_sync = False  # else buffers are broadcast
    outputs = DistributedDataParallel.forward(ddp, argument)  # type: ignore[no-untyped-call]
    return outputs, [torch.zeros((), dtype=each.dtype, device=each.device).expand_as(each) for each in outputs]


def sparse_layer(module: nn.Module) -> str | None:
    """The name of a layer whose gradients are sparse; None where there is none."""
    embeddings = (
        (name, each) for name, each in module.named_modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag)
    )
    return next((name or "the module" for name, each in embeddings if each.sparse), None)
