"""One rank's states as bytes, and back.

Contract: `pack` writes all states of a plan into a payload on the states' device, and what is needed to read it (how
many batches each metric took, which tensors the lists hold) into a manifest of integers on the host, so that reading
never waits for a device. The plan's blocks come first in the payload, so that they are at the same place in that of
every rank: `unpack_blocks` reads them for all ranks at once, and `unpack` what else one rank sent. Nothing passes
through a type that could round it.

`element_parts` and `read_elements` do the same for any tensors and objects; `allstep.outputs` uses them too.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from allstep.metrics.nodes import MetricNode
from allstep.metrics.states import GatheredState, ReductionPlan

ALIGNMENT = 16  # of each tensor, for any element type
_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_OBJECT = -1  # stands for an element type where a pickled object follows

# By node and state: tensors that a loaded state brought along and that only the reduction itself can join to the own.
Unmerged = Mapping[tuple[int, str], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Packed:
    """One rank's values in transit: a manifest of integers, and the byte tensors that the payload consists of."""

    manifest: list[int]
    parts: list[torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return sum(padded(part.numel()) for part in self.parts)

    def write(self, buffer: torch.Tensor) -> None:
        """Write the payload into a buffer of bytes, at its beginning."""
        at = 0
        for part in self.parts:
            buffer[at : at + part.numel()] = part
            at += padded(part.numel())


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What one rank sent beside the blocks.

    Attributes:
        updates: batches that each node took.
        gathered: each gathered state's tensors.
        values: by node, the plain attributes that its updates set beside the states.
    """

    updates: list[int]
    gathered: list[list[Any]]
    values: dict[int, dict[str, Any]]


def padded(size: int) -> int:
    """A size in bytes, rounded up so that what follows is aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def block_values(plan: ReductionPlan) -> list[torch.Tensor]:
    """Each block of a plan, as one flat tensor of what this rank has, in memory of its own."""
    with torch.no_grad():
        return [torch.cat([plan.value(state).reshape(-1) for state in block.states]) for block in plan.blocks]


def own_elements(node: MetricNode, state: GatheredState, unmerged: Sequence[Any] = ()) -> list[Any]:
    """The tensors that this rank gives of a gathered state; a tensor state only when it has seen anything."""
    value = getattr(node.metric, state.name)
    # A list that was synchronised by hand is one tensor.
    if not state.is_list or isinstance(value, torch.Tensor):
        return [*unmerged, value] if node.updates or state.is_list else [*unmerged]
    elements = [*unmerged, *value]
    if state.concatenates and len(elements) > 1:
        # Joined here, a thousand batches travel as one tensor with one line in the manifest.
        assert state.reduction is not None
        return [state.reduction(elements)]
    return elements


def pack(plan: ReductionPlan, unmerged: Unmerged, *, blocks_apart: bool) -> Packed:
    """This rank's states.

    Args:
        plan: what to pack, and on which device.
        unmerged: what loaded states brought along.
        blocks_apart: leave the blocks out, since they are reduced by collectives of their own.

    Raises:
        MetricError: a state that was declared as a tensor is none.
    """
    # Before anything is packed, so that the error names the state and not the place where packing fails.
    plan.check_tensors()
    manifest = [node.updates for node in plan.nodes]
    parts: list[torch.Tensor] = []
    if not blocks_apart:
        parts += [values.view(torch.uint8) for values in block_values(plan)]
    for state in plan.gathered:
        elements = own_elements(plan.nodes[state.node], state, unmerged.get((state.node, state.name), ()))
        manifest.append(len(elements))
        parts += element_parts(elements, manifest)
    values = {
        place: changed for place, node in enumerate(plan.nodes) if node.updates and (changed := node.changed_values())
    }
    # One object for all metrics: most have none, and pickling costs more than the rest of a small frame.
    manifest.append(len(values) > 0)
    parts += element_parts([values] if values else [], manifest)
    return Packed(manifest, [part if part.device == plan.device else part.to(plan.device) for part in parts])


def unpack_blocks(plan: ReductionPlan, payloads: torch.Tensor) -> list[list[torch.Tensor]]:
    """For each block what each rank gave, flat, in rank order; views of the payloads, uint8 (ranks, n)."""
    at = 0
    blocks: list[list[torch.Tensor]] = []
    for block in plan.blocks:
        size = block.length * block.dtype.itemsize
        rows = payloads[:, at : at + size]
        blocks.append(list(rows.view(block.dtype) if size else rows.new_empty(rows.shape, dtype=block.dtype)))
        at += padded(size)
    return blocks


def unpack(plan: ReductionPlan, manifest: Sequence[int], payload: torch.Tensor, *, blocks_apart: bool) -> Unpacked:
    """What else a rank's `pack` of an equal plan gave. Tensors are views of the payload, uint8 (n,)."""
    at = 0 if blocks_apart else sum(padded(block.length * block.dtype.itemsize) for block in plan.blocks)
    numbers = iter(manifest)
    updates = [next(numbers) for _ in plan.nodes]
    elements = read_elements(numbers, payload, at)
    gathered = [[next(elements) for _ in range(next(numbers))] for _ in plan.gathered]
    values = [next(elements) for _ in range(next(numbers))]
    return Unpacked(updates, gathered, values[0] if values else {})


def element_parts(elements: Iterable[Any], manifest: list[int]) -> list[torch.Tensor]:
    """The bytes of tensors; what they are, and whatever is no tensor, is added to the manifest."""
    parts = []
    for element in elements:
        if isinstance(element, torch.Tensor):
            manifest += [_CODES[element.dtype], element.ndim, *element.shape]
            parts.append(_to_bytes(element.detach()))
        else:
            # Tuples, texts and the like: small things that a metric keeps in a list beside tensors, sent as integers.
            data = pickle.dumps(element)
            words = bytearray(data + bytes(-len(data) % 8))
            manifest += [_OBJECT, len(words) // 8, *memoryview(words).cast("q")]
    return parts


def read_elements(numbers: Iterator[int], payload: torch.Tensor, at: int) -> Iterator[Any]:
    """The elements that `element_parts` wrote, one after another.

    Args:
        numbers: the manifest, from where these elements begin.
        payload: bytes (n,).
        at: where in it their tensors begin.
    """
    while True:
        code, count = next(numbers), next(numbers)
        shape = tuple(next(numbers) for _ in range(count))
        if code == _OBJECT:
            yield pickle.loads(struct.pack(f"={count}q", *shape))
            continue
        dtype = _DTYPES[code]
        size = torch.Size(shape).numel() * dtype.itemsize
        found = _from_bytes(payload[at : at + size], dtype, shape)
        at += padded(size)
        yield found


def _to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _from_bytes(data: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return data.view(dtype).reshape(shape) if data.numel() else data.new_empty(shape, dtype=dtype)
