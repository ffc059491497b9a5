"""Outputs sample by sample, and all ranks' outputs in one order: pure functions.

Contract: a rank keeps what it has seen, in the order in which it saw it, as `Samples`: for each sample where it stands
and, by name, a tensor. `joined` joins those of all ranks, of which any may have none. Tensors of one shape and
type become one tensor with a row a sample; others stay a list. `flattened` and `restored` turn ragged tensors into two
plain ones and back.

Samples as bytes, and every rank's bytes on every rank that wants them.

Contract: `samples_packed` and `samples_unpacked` are each other's inverse, given equal names. `payloads_of_all` is
called by all ranks with the same sizes. What can go wrong: memory runs out on one rank, which it raises only after it
has taken part in every collective, so that the others do not wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from allstep.coordination import Coordinator
from allstep.metrics.packing import Packed, element_parts, padded, read_elements

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


PIECE = 64 * 2**20


def samples_packed(samples: Samples, names: Sequence[str]) -> Packed:
    """One rank's samples in transit."""
    manifest: list[int] = []
    parts = element_parts([samples.places], manifest)
    for name in names:
        column = samples.columns[name]
        ragged = isinstance(column, list)
        elements = column if isinstance(column, list) else [column]
        manifest += [ragged, len(elements)]
        parts += element_parts(elements, manifest)
    return Packed(manifest, parts)


def samples_unpacked(manifest: Sequence[int], payload: torch.Tensor, names: Sequence[str]) -> Samples:
    """What another rank's `samples_packed` gave. Tensors are views of the payload."""
    numbers = iter(manifest)
    elements = read_elements(numbers, payload, 0)
    places = next(elements)
    columns: dict[str, Column] = {}
    for name in names:
        ragged, count = next(numbers), next(numbers)
        found = [next(elements) for _ in range(count)]
        columns[name] = found if ragged else found[0]
    return Samples(places, columns)


def payloads_of_all(
    coordinator: Coordinator, packed: Packed, sizes: Sequence[int], *, keeps: bool
) -> list[torch.Tensor]:
    """Every rank's payload, given in pieces so that a rank that keeps none never holds much more than one.

    Args:
        coordinator: of the ranks.
        packed: what this rank gives.
        sizes: bytes that each rank gives.
        keeps: whether this rank is given anything; else the result is empty.
    """
    longest = max(sizes)
    own: torch.Tensor | None = None
    kept: list[torch.Tensor] = []
    failure: Exception | None = None
    try:
        own = torch.empty(longest, dtype=torch.uint8)
        packed.write(own)
        if coordinator.world_size == 1:
            return [own]
        kept = [torch.empty(padded(size), dtype=torch.uint8) for size in sizes] if keeps else []
    except Exception as error:  # most likely of memory; the others are waiting
        failure = error
    for at in range(0, longest, PIECE):
        length = min(PIECE, longest - at)
        rows = coordinator.gather_bytes(
            torch.zeros(length, dtype=torch.uint8) if own is None else own[at : at + length]
        )
        for whole, row in zip(kept, rows, strict=bool(kept)):
            piece = whole[at : at + length]
            piece.copy_(row[: len(piece)])
    if failure is not None:
        raise failure
    return kept
