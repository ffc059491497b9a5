"""One rank's states as bytes, and back.

Contract: all states of a plan go into a payload on the states' device, and what is needed to read it (how many batches
each metric took, which tensors the lists hold) into a manifest of integers on the host, so that reading never waits
for a device. The plan's blocks come first in the payload, so that they are at the same place in that of every rank:
`BlockWriter` writes them, and `block_rows` reads them for all ranks at once. `pack` and `unpack` are for what else one
rank sends. Nothing passes through a type that could round it.

`element_parts` and `read_elements` do the same for any tensors and objects; `allstep.outputs` uses them too.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchmetrics import Metric

from allstep.metrics.nodes import MetricNode
from allstep.metrics.states import GatheredState, ReductionPlan, padded

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

    def write(self, buffer: torch.Tensor, at: int = 0) -> None:
        """Write the payload into a buffer of bytes, from byte `at` on."""
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


class BlockWriter:
    """Writes the blocks of a plan into one and the same payload, at each event anew.

    Args:
        plan: whose blocks.
        payload: bytes (n,), on any device.
    """

    def __init__(self, plan: ReductionPlan, payload: torch.Tensor) -> None:
        self._targets: list[tuple[Metric, str, torch.Tensor]] = []
        for block in plan.blocks:
            if block.size:
                values = payload[block.at : block.at + block.size].view(block.dtype)
                for state, target in zip(block.states, block.parts(values), strict=True):
                    self._targets.append((plan.nodes[state.node].metric, state.name, target))

    def write(self) -> None:
        """Write what this rank holds now."""
        with torch.no_grad():
            for metric, name, target in self._targets:
                target.copy_(getattr(metric, name))


def block_rows(plan: ReductionPlan, payloads: torch.Tensor) -> list[list[torch.Tensor]]:
    """For each block what each rank gave, flat, in rank order; views of the payloads, uint8 (ranks, n)."""
    blocks: list[list[torch.Tensor]] = []
    for block in plan.blocks:
        rows = payloads[:, block.at : block.at + block.size]
        blocks.append(list(rows.view(block.dtype) if block.size else rows.new_empty(rows.shape, dtype=block.dtype)))
    return blocks


def block_values(plan: ReductionPlan) -> list[torch.Tensor]:
    """Each block of a plan, as one flat tensor of what this rank has, in memory of its own on the plan's device."""
    with torch.no_grad():
        return [
            torch.cat([plan.value(state).reshape(-1).to(plan.device) for state in block.states])
            for block in plan.blocks
        ]


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


def pack(plan: ReductionPlan, unmerged: Unmerged) -> Packed:
    """This rank's states beside the blocks.

    Args:
        plan: what to pack, and on which device.
        unmerged: what loaded states brought along.

    Raises:
        MetricError: a state that was declared as a tensor is none.
    """
    # Before anything is packed, so that the error names the state and not the place where packing fails.
    plan.check_tensors()
    manifest = [node.updates for node in plan.nodes]
    parts: list[torch.Tensor] = []
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


def unpack(plan: ReductionPlan, manifest: Sequence[int], payload: torch.Tensor, at: int) -> Unpacked:
    """What a rank's `pack` of an equal plan gave. Tensors are views of the payload, uint8 (n,), from byte `at` on."""
    updates, rest = list(manifest[: len(plan.nodes)]), manifest[len(plan.nodes) :]
    if len(rest) == 1:  # nothing beside the blocks, as of most metrics
        return Unpacked(updates, [], {})
    numbers = iter(rest)
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
