"""Samples as bytes, and every rank's bytes on every rank that wants them.

Contract: `samples_packed` and `samples_unpacked` are each other's inverse, given equal names. `payloads_of_all` is
called by all ranks with the same sizes. What can go wrong: memory runs out on one rank, which it raises only after it
has taken part in every collective, so that the others do not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from allstep.coordination import Coordinator
from allstep.metrics.packing import Packed, element_parts, elements_of, padded
from allstep.metrics.samples import Column, Samples

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
    elements = elements_of(numbers, payload, 0)
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
