"""A loss scaler whose ranks agree, on whatever meshes the parts of their gradients lie.

Contract: `grad_scaler` makes one. It is torch's own, which knows of an infinity in any part of gradients that all lie
on one mesh. Where they lie on several, or some are whole, an element that is not finite on one rank is first made known
to all: each rank spoils a gradient of its own, of a step that is left out anyway. So all ranks leave out the same
steps, and have the same scale. Every rank that holds a part of the model calls `unscale_` and `step` at the same point.
Nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from allstep.parallel.dtensor import is_dtensor
from allstep.parallel.gradient_norm import gradient_norm


class MeshGradScaler(torch.amp.GradScaler):
    """torch's GradScaler over gradients on several meshes, and whole ones beside those in parts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared: set[int] = set()  # optimizers whose gradients were looked at since the last update
        self._unscaled: set[int] = set()

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """As in torch."""
        self._share(optimizer)
        with _by_parts(optimizer) if _is_mixed(optimizer) else nullcontext():
            super().unscale_(optimizer)
        self._unscaled.add(id(optimizer))

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As in torch."""
        self._share(optimizer)  # a fused optimizer unscales by itself
        if _is_mixed(optimizer) and id(optimizer) not in self._unscaled:
            self.unscale_(optimizer)
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """As in torch."""
        self._shared.clear()
        self._unscaled.clear()
        super().update(new_scale)

    @torch.no_grad()
    def _share(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.is_enabled() or id(optimizer) in self._shared:
            return
        self._shared.add(id(optimizer))
        parameters = _with_gradients(optimizer)
        meshes = {each.grad.device_mesh for each in parameters if is_dtensor(each.grad)}
        if len(meshes) < 2 and not _is_mixed(optimizer):
            return
        total = gradient_norm(parameters, 1.0)  # of absolute values, which is finite where all of them are
        for each in parameters:
            held = each.grad.to_local() if is_dtensor(each.grad) else each.grad
            if held.numel():
                # The first element, in whatever layout; what is added is no number where the total is not finite.
                held[(0,) * held.dim()].add_((total * 0).to(held.device, held.dtype))
                return


def _with_gradients(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]


def _is_mixed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether some gradients are in parts and others whole, which torch does not take in one call."""
    return len({is_dtensor(each.grad) for each in _with_gradients(optimizer)}) == 2


@contextmanager
def _by_parts(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have an optimizer's gradients be plain tensors in the body: of those in parts what this rank holds."""
    groups = [(group, group["params"]) for group in optimizer.param_groups]
    for group, parameters in groups:
        group["params"] = [_part(each) if each.grad is not None else each for each in parameters]
    try:
        yield
    finally:
        for group, parameters in groups:
            group["params"] = parameters


def _part(parameter: Any) -> Any:
    """A plain tensor with the memory of the gradient that this rank holds."""
    if not is_dtensor(parameter.grad):
        return parameter
    held = parameter.grad.to_local()
    part = torch.empty_like(held)
    part.grad = held
    return part
