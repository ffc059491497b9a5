"""Outputs sample by sample, and all ranks' outputs in one order: pure functions.

Contract: a rank keeps what it has seen, in the order in which it saw it, as `Samples`: for each sample where it stands
and, by name, a tensor. `joined` joins those of all ranks, of which any may have none. Tensors of one shape and
type become one tensor with a row a sample; others stay a list. `flattened` and `restored` turn ragged tensors into two
plain ones and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PLACES = 2  # integers that say where a sample stands: its index in the dataset, where known, and the iteration

# One tensor with a row a sample, or a list with a tensor a sample.
Column = torch.Tensor | list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Samples:
    """Some samples: `places` int64 (n, 2), and for each name n samples."""

    places: torch.Tensor
    columns: Mapping[str, Column]


NOTHING = Samples(torch.zeros((0, PLACES), dtype=torch.int64), {})


def column_of(batches: Sequence[Any]) -> Column:
    """One column of what each batch had: a tensor with a row a sample, or a list of tensors."""
    tensors = [batch for batch in batches if isinstance(batch, torch.Tensor)]
    if len(tensors) == len(batches) and len({(t.dtype, t.shape[1:]) for t in tensors}) == 1:
        return torch.cat(tensors)
    return [sample for batch in batches for sample in (batch.unbind() if isinstance(batch, torch.Tensor) else batch)]


def joined(parts: Sequence[Samples], names: Sequence[str], *, are_dealt: bool) -> dict[str, Column]:
    """All samples in order.

    Args:
        parts: of each rank, in rank order.
        names: of the columns.
        are_dealt: whether all indices are known: then samples are in their order, and "index" has them; else they are
            in order of iteration, then rank.
    """
    places = torch.cat([part.places for part in parts])
    order = torch.sort(places[:, 0 if are_dealt else 1], stable=True).indices
    found = {
        name: _ordered(column_of([part.columns[name] for part in parts if len(part.places)]), order) for name in names
    }
    if are_dealt:
        found["index"] = places[order, 0]
    return found


def _ordered(column: Column, order: torch.Tensor) -> Column:
    if isinstance(column, torch.Tensor):
        return column[order]
    return [column[at] for at in order.tolist()]


def flattened(name: str, column: Column) -> dict[str, torch.Tensor]:
    """A column as plain tensors, by a kind and the name: "rows", or all "values" in one row and each sample's "shapes".

    No two names have a tensor of the same key. Raises ValueError when samples differ in type or number of dimensions.
    """
    if isinstance(column, torch.Tensor):
        return {f"rows.{name}": column}
    if len({(sample.dtype, sample.ndim) for sample in column}) > 1:
        raise ValueError(
            f"samples of {name!r} differ in type or number of dimensions; they cannot be written to a file"
        )
    dimensions = column[0].ndim if column else 0
    shapes = torch.tensor([list(sample.shape) for sample in column], dtype=torch.int64).reshape(len(column), dimensions)
    values = torch.cat([sample.reshape(-1) for sample in column]) if column else torch.empty(0)
    return {f"values.{name}": values, f"shapes.{name}": shapes}


def restored(name: str, tensors: Mapping[str, torch.Tensor]) -> Column:
    """The column that `flattened` gave."""
    if f"rows.{name}" in tensors:
        return tensors[f"rows.{name}"]
    shapes = [torch.Size(shape) for shape in tensors[f"shapes.{name}"].tolist()]
    rows = torch.split(tensors[f"values.{name}"], [shape.numel() for shape in shapes]) if shapes else ()
    return [row.reshape(shape) for row, shape in zip(rows, shapes, strict=True)]
