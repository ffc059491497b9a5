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
from allstep.errors import MetricError, MetricMismatchError
from allstep.metrics.states import GatheredState, reduction_name

_LOWEST = -(2**63)

# Types whose sums need no other type on the way: what most metrics count in.
_SUMMED_AS_THEY_ARE = frozenset({torch.int64, torch.float32, torch.float64})


def to_accumulator(values: torch.Tensor, op: ReduceOp) -> torch.Tensor:
    """A copy of values in the type in which they are reduced: integers add up in int64, small floats in float32."""
    widened = values.to(_accumulator_type(values.dtype), copy=True)
    return widened ^ _LOWEST if _is_shifted(values.dtype, op) else widened


def from_accumulator(total: torch.Tensor, dtype: torch.dtype, op: ReduceOp) -> torch.Tensor:
    """What was reduced, of values of `dtype`, in the type of the result."""
    shifted, result_type = total ^ _LOWEST if _is_shifted(dtype, op) else total, _result_type(dtype, op)
    return shifted if shifted.dtype == result_type else shifted.to(result_type)


def _is_shifted(dtype: torch.dtype, op: ReduceOp) -> bool:
    """Whether values are moved down by 2^63 for int64 to order them, which holds the greater half as negative."""
    return dtype == torch.uint64 and op != "sum"


def _accumulator_type(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex or (dtype.is_floating_point and dtype.itemsize >= 4):
        return dtype
    # Half-precision sums over many ranks would round at each addition.
    if dtype.is_floating_point:
        return torch.float32
    return torch.int64


def _result_type(dtype: torch.dtype, op: ReduceOp) -> torch.dtype:
    """Integers that were added stay in int64, uint64 in its own range."""
    grows = op == "sum" and not (dtype.is_floating_point or dtype.is_complex or dtype == torch.uint64)
    return torch.int64 if grows else dtype


def fold(rows: Sequence[torch.Tensor], op: ReduceOp) -> torch.Tensor:
    """Reduce the tensors of all ranks, of one shape and type, element by element, one rank after the other."""
    dtype, others = rows[0].dtype, rows[1:]
    # Not a sum over a stack: torch may add that up in another order on another rank's hardware.
    if op == "sum" and dtype in _SUMMED_AS_THEY_ARE:
        total = rows[0].clone()
        for row in others:
            total += row
        return total
    total = to_accumulator(rows[0], op)
    for row in others:
        if op == "sum":
            total += row if row.dtype == total.dtype else row.to(total.dtype)
        else:
            total = (torch.maximum if op == "max" else torch.minimum)(total, to_accumulator(row, op))
    return from_accumulator(total, dtype, op)


def fold_gathered(state: GatheredState, metric: str, by_rank: Sequence[Sequence[Any]]) -> Any:
    """Reduce what each rank gave of a gathered state; None where nobody gave anything, so that it keeps its default.

    Args:
        state: which.
        metric: its metric's name, for errors.
        by_rank: the tensors of each rank, in rank order.

    Raises:
        MetricMismatchError: tensors of different ranks do not fit together.
        MetricError: the reduction fails.
    """
    # Rank order, so that concatenations and stacks are the same everywhere.
    tensors = [tensor for of_rank in by_rank for tensor in of_rank]
    if not tensors:
        return None
    try:
        if state.concatenates:
            return dim_zero_cat(tensors)
        stacked = tensors if state.is_list else torch.stack(tensors)
    except RuntimeError as error:
        shapes = "; ".join(f"rank {rank}: {_shapes(of_rank)}" for rank, of_rank in enumerate(by_rank))
        raise MetricMismatchError(
            f"metric {metric!r}, state {state.name!r}: what ranks hold does not fit together ({error}). {shapes}"
        ) from error
    if state.reduction is None:
        return stacked
    try:
        # torchmetrics' mean of integers raises; complex numbers are left to it.
        if state.reduction is dim_zero_mean and isinstance(stacked, torch.Tensor) and not stacked.is_complex():
            return _mean(stacked)
        return state.reduction(stacked)
    except RuntimeError as error:
        raise MetricError(
            f"metric {metric!r}, state {state.name!r}: {reduction_name(state.reduction)} failed on what all ranks "
            f"hold, {_shown(stacked)}: {error}"
        ) from error


def _mean(stacked: torch.Tensor) -> torch.Tensor:
    """The mean over the first dimension; that of integers is a float."""
    dtype = stacked.dtype if stacked.is_floating_point() else torch.get_default_dtype()
    # Not `stacked.mean(0)`: how that adds up depends on the shape, and small floats would add up in themselves.
    total = fold(stacked.to(_accumulator_type(dtype)).unbind(), "sum")
    return (total / len(stacked)).to(dtype)


def _shown(held: Any) -> str:
    if isinstance(held, torch.Tensor):
        return f"stacked to {str(held.dtype).removeprefix('torch.')} of shape {tuple(held.shape)}"
    return f"a list of {len(held)}"


def _shapes(tensors: Sequence[Any]) -> str:
    shown = sorted({f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape[1:])}" for t in tensors if t.ndim})
    return ", ".join(shown) + " a sample" if shown else "nothing"
