"""Outputs sample by sample, and all ranks' outputs in one order: pure functions.

Contract: a rank keeps what it has seen as `Samples`: for each sample where it stands (three integers that sort into the
order) and, by name, a tensor. `in_order` joins those of all ranks. Tensors of one shape and type become one tensor with
a row a sample; others stay a list. `flattened` and `restored` turn ragged tensors into two plain ones and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PLACES = 3  # integers that say where a sample stands

# One tensor with a row a sample, or a list with a tensor a sample.
Column = torch.Tensor | list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Samples:
    """Some samples: `places` int64 (n, 3), and for each name n samples."""

    places: torch.Tensor
    columns: Mapping[str, Column]


def column_of(batches: Sequence[Any]) -> Column:
    """One column of what each batch had: a tensor with a row a sample, or a list of tensors."""
    tensors = [batch for batch in batches if isinstance(batch, torch.Tensor)]
    if len(tensors) == len(batches) and len({(t.dtype, t.shape[1:]) for t in tensors}) == 1:
        return torch.cat(tensors)
    return [sample for batch in batches for sample in (batch.unbind() if isinstance(batch, torch.Tensor) else batch)]


def in_order(parts: Sequence[Samples], names: Sequence[str]) -> dict[str, Column]:
    """All samples in the order of their places."""
    places = torch.cat([part.places for part in parts])
    order = torch.arange(len(places))
    for column in reversed(range(PLACES)):
        order = order[torch.sort(places[order, column], stable=True).indices]
    return {
        name: _ordered(column_of([part.columns[name] for part in parts if len(part.places)]), order) for name in names
    }


def _ordered(column: Column, order: torch.Tensor) -> Column:
    if isinstance(column, torch.Tensor):
        return column[order]
    return [column[at] for at in order.tolist()]


def flattened(name: str, column: Column) -> dict[str, torch.Tensor]:
    """A column as plain tensors: itself, or all values in one row, and each sample's shape.

    Raises ValueError when samples differ in type or number of dimensions.
    """
    if isinstance(column, torch.Tensor):
        return {name: column}
    if len({(sample.dtype, sample.ndim) for sample in column}) > 1:
        raise ValueError(
            f"samples of {name!r} differ in type or number of dimensions; they cannot be written to a file"
        )
    shapes = torch.tensor([list(sample.shape) for sample in column], dtype=torch.int64).reshape(len(column), -1)
    values = torch.cat([sample.reshape(-1) for sample in column]) if column else torch.empty(0)
    return {f"{name}.values": values, f"{name}.shapes": shapes}


def restored(name: str, tensors: Mapping[str, torch.Tensor]) -> Column:
    """The column that `flattened` gave."""
    if name in tensors:
        return tensors[name]
    shapes = [torch.Size(shape) for shape in tensors[f"{name}.shapes"].tolist()]
    rows = torch.split(tensors[f"{name}.values"], [shape.numel() for shape in shapes])
    return [row.reshape(shape) for row, shape in zip(rows, shapes, strict=True)]
