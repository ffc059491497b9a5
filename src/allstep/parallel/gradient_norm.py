"""The norm of gradients over any mesh, and clipping by it.

Contract: every rank that holds a part of the model calls these at the same point, with the same parameters. The norm is
that of the whole gradient, the same on all of them: of a DTensor each rank adds up its own part, and the sums go over
the ranks of the dimensions that it is sharded over, in one small reduction for each kind of placement. A gradient that
is no DTensor is whole on this rank. Parameters may lie on several meshes. The norm stays on its device: nothing here
waits for that. What can go wrong: a norm that is NaN or infinite makes all gradients so, unless that is refused, which
waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from allstep.errors import ArgumentError, ParallelError
from allstep.parallel.dtensor import is_dtensor

Parameters = nn.Module | torch.Tensor | Iterable[torch.Tensor]


def gradient_norm(parameters: Parameters, norm_type: float = 2.0) -> torch.Tensor:
    """The p-norm of all gradients together, a scalar tensor; 0 where there is no gradient.

    Args:
        parameters: a module, or some parameters; those without a gradient count for nothing.
        norm_type: p; infinity for the largest element.

    Raises:
        ArgumentError: norm_type is not more than 0.
    """
    return _norm(_gradients(parameters), norm_type)


def _norm(gradients: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    if not norm_type > 0:
        raise ArgumentError(f"norm_type is {norm_type!r}; it must be more than 0")
    if not any(is_dtensor(each) for each in gradients):
        return torch.nn.utils.get_total_norm(gradients, norm_type)
    by_placement: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[torch.Tensor]] = {}
    for gradient in gradients:
        mesh, over = _sharded_over(gradient)
        by_placement.setdefault((mesh, over), []).append(_whole_or_part(gradient))
    totals = [_reduced(_power_sum(of, norm_type), mesh, over, norm_type) for (mesh, over), of in by_placement.items()]
    together = torch.stack([each.to(totals[0].device) for each in totals])
    return together.amax() if math.isinf(norm_type) else together.sum().pow(1.0 / norm_type)


@torch.no_grad()
def clip_gradient_norm(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scale all gradients down together where their norm is more than `max_norm`; returns the norm before that.

    Args:
        parameters: a module, or some parameters.
        max_norm: the largest norm that stays.
        norm_type: p of the p-norm; infinity for the largest element.
        error_if_nonfinite: raise where the norm is NaN or infinite. This waits for the device.
        scale: how many times too large the gradients are, by a GradScaler that has not unscaled them.

    Raises:
        ArgumentError: max_norm is negative, or norm_type is not more than 0.
        ParallelError: the norm is not finite and that was to be an error.
    """
    if not max_norm >= 0:
        raise ArgumentError(f"max_norm is {max_norm!r}; it must be 0 or more")
    gradients = _gradients(parameters)
    norm = _norm(gradients, norm_type)
    if scale is not None:
        norm = norm / scale
    if error_if_nonfinite and not norm.isfinite():
        raise ParallelError(
            f"the norm of the gradients is {norm.item()}, so they cannot be clipped by it; find what made them so with "
            "torch.autograd.detect_anomaly(), or leave error_if_nonfinite out to go on"
        )
    # Torch's own loop over what has a gradient, which is given this rank's parts.
    holders = [SimpleNamespace(grad=each) for each in map(_whole_or_part, gradients)]
    torch.nn.utils.clip_grads_with_norm_(holders, max_norm, norm)  # type: ignore[arg-type]
    return norm


def _gradients(parameters: Parameters) -> list[torch.Tensor]:
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    elif isinstance(parameters, torch.Tensor):
        parameters = [parameters]
    return [each.grad for each in parameters if each.grad is not None]


def _sharded_over(gradient: torch.Tensor) -> tuple[DeviceMesh | None, tuple[int, ...]]:
    """The mesh of a gradient, and over which of its dimensions each rank holds another part."""
    if not is_dtensor(gradient):
        return None, ()
    over = tuple(dim for dim, placement in enumerate(gradient.placements) if not placement.is_replicate())
    return (gradient.device_mesh, over) if over else (None, ())


def _whole_or_part(gradient: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a gradient."""
    if not is_dtensor(gradient):
        return gradient
    if any(placement.is_partial() for placement in gradient.placements):
        raise ParallelError(
            f"a gradient is placed as {gradient.placements}, so it is not reduced yet; redistribute it before it is "
            "clipped"
        )
    return gradient.to_local()


def _power_sum(parts: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """What adds up over ranks: the sum of powers, or the largest element."""
    filled = [each for each in parts if each.numel()]
    # The same on ranks with and without elements; and sixteen bits hold no square of a large norm.
    dtype = torch.float64 if any(each.dtype == torch.float64 for each in parts) else torch.float32
    if not filled:
        return torch.zeros((), dtype=dtype, device=parts[0].device)
    norm = torch.nn.utils.get_total_norm(filled, norm_type).to(dtype)
    return norm if math.isinf(norm_type) else norm.pow(norm_type)


def _reduced(total: torch.Tensor, mesh: DeviceMesh | None, over: tuple[int, ...], norm_type: float) -> torch.Tensor:
    if mesh is None:
        return total
    is_largest, device = math.isinf(norm_type), total.device
    carried = total.to(mesh.device_type)  # parts that are kept on the host are reduced where the group's backend can
    if is_largest:  # a largest of several may lose what is not a number
        unknown = carried.isnan()
        carried = torch.stack([carried.nan_to_num(nan=0.0, posinf=torch.inf), unknown.to(carried.dtype)])
    for dim in over:
        op = dist.ReduceOp.MAX if is_largest else dist.ReduceOp.SUM
        dist.all_reduce(carried, op=op, group=mesh.get_group(dim))
    if is_largest:
        carried = carried[0].masked_fill(carried[1] > 0, torch.nan)
    return carried.to(device)
