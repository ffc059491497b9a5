"""What all ranks' states together are: pure functions of what each rank had, in rank order.

Contract: every rank calls these with the same tensors and computes the same bits, since each addition is one
element-wise operation in rank order. Semantics are torchmetrics': tensors are stacked, or concatenated, and given to
the state's reduction; lists are flattened. A rank that has seen nothing gives nothing to a mean, a stack or a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_mean

from allstep.coordination import ReduceOp
from allstep.errors import MetricMismatchError
from allstep.metrics.plan import ListedState


def carrier(dtype: torch.dtype) -> torch.dtype:
    """In which type elements are reduced: integers add up in int64, 16-bit floats in float32."""
    if dtype.is_complex or (dtype.is_floating_point and dtype.itemsize >= 4):
        return dtype
    if dtype.is_floating_point:
        return torch.float32
    return torch.int64


def result_type(dtype: torch.dtype, op: ReduceOp) -> torch.dtype:
    """The type of what is reduced: integers that were added stay in int64."""
    grows = op == "sum" and not (dtype.is_floating_point or dtype.is_complex)
    return torch.int64 if grows else dtype


def fold(rows: Sequence[torch.Tensor], op: ReduceOp) -> torch.Tensor:
    """Reduce the tensors of all ranks, of one shape and type, element by element, one rank after the other."""
    dtype = rows[0].dtype
    total = rows[0].to(carrier(dtype), copy=True)
    for row in rows[1:]:
        if op == "sum":
            total += row
        else:
            total = (torch.maximum if op == "max" else torch.minimum)(total, row.to(total.dtype))
    return total.to(result_type(dtype, op))


def fold_listed(state: ListedState, metric: str, given: Sequence[Sequence[Any]]) -> Any:
    """Reduce what each rank gave of a listed state; None where nobody gave anything, so that it keeps its beginning.

    Args:
        state: which.
        metric: its metric's name, for errors.
        given: the tensors of each rank, in rank order.

    Raises:
        MetricMismatchError: tensors of different ranks do not fit together.
    """
    every = [tensor for of_rank in given for tensor in of_rank]
    if not every:
        return None
    try:
        if state.concatenates:
            return dim_zero_cat(every)
        if state.is_list:
            return every if state.reduction is None else state.reduction(every)
        stacked = torch.stack(every)
    except RuntimeError as error:
        shapes = "; ".join(f"rank {rank}: {_shapes(of_rank)}" for rank, of_rank in enumerate(given))
        raise MetricMismatchError(
            f"metric {metric!r}, state {state.name!r}: what ranks hold does not fit together ({error}). {shapes}"
        ) from error
    if state.reduction is None:
        return stacked
    if state.reduction is dim_zero_mean and stacked.is_floating_point():
        return _mean(stacked)
    return state.reduction(stacked)


def _mean(stacked: torch.Tensor) -> torch.Tensor:
    return (fold(stacked.to(carrier(stacked.dtype)).unbind(), "sum") / len(stacked)).to(stacked.dtype)


def _shapes(tensors: Sequence[Any]) -> str:
    shown = sorted({f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape[1:])}" for t in tensors if t.ndim})
    return ", ".join(shown) + " a sample" if shown else "nothing"
