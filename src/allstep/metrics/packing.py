"""One rank's states as one buffer of bytes, and back.

Contract: `pack` writes all states of a plan into a payload on the states' device, and what is needed to read it (how
many batches each metric took, what tensors the lists hold) into a manifest of integers on the host, so that reading
never waits for a device. `unpack` reads what one rank sent. Nothing passes through a type that could round it.

States of a rank that has seen nothing, in the shapes and types that updates gave them on other ranks.

Contract: some metrics begin with a number and make it a row at the first update (torchmetrics' `R2Score` of several
outputs), so that ranks that have taken batches differ from those that have not. `adopt` is called on all ranks when
their schemas differ: what a metric without a batch holds is its beginning, which is as well spread over the shape of
the others. What still differs then is raised on all ranks alike; a beginning that cannot be spread so is left, and
shows in the next comparison.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from allstep.coordination import Coordinator, Schema, check_schemas
from allstep.metrics.nodes import Node
from allstep.metrics.states import Form, ListedState, Plan, form_of

ALIGNMENT = 16  # of each tensor, for any element type
_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_OBJECT = -1

# By node and state: tensors that a loaded state brought along and that only the reduction itself can join to the own.
Carried = Mapping[tuple[int, str], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Packed:
    """One rank's states in transit: a manifest of integers, and the tensors that the payload consists of."""

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
    """What one rank sent.

    Attributes:
        updates: batches that each node took.
        blocks: each block's elements; empty where blocks travelled apart.
        listed: each listed state's tensors.
        learnt: by node, what its updates set beside the states.
    """

    updates: list[int]
    blocks: list[torch.Tensor]
    listed: list[list[Any]]
    learnt: dict[int, dict[str, Any]]


def padded(size: int) -> int:
    """A size in bytes, rounded up so that what follows is aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def block_values(plan: Plan) -> list[torch.Tensor]:
    """Each block of a plan, as one flat tensor of what this rank has."""
    return [
        torch.cat([state.value(plan.nodes[state.node]).detach().reshape(-1) for state in block.states])
        for block in plan.blocks
    ]


def given(node: Node, state: ListedState, carried: Sequence[Any] = ()) -> list[Any]:
    """The tensors that this rank gives of a listed state; a tensor state only when it has seen anything."""
    value = getattr(node.metric, state.name)
    if not state.is_list or isinstance(value, torch.Tensor):
        own = [value] if node.updates or state.is_list else []
        return [*carried, *own]
    elements = [*carried, *value]
    if state.concatenates and len(elements) > 1:
        assert state.reduction is not None
        return [state.reduction(elements)]
    return elements


def pack(plan: Plan, device: torch.device, carried: Carried, *, blocks_apart: bool) -> Packed:
    """This rank's states.

    Args:
        plan: what to pack.
        device: where the payload is to be.
        carried: what loaded states brought along.
        blocks_apart: leave the blocks out, since they are reduced by collectives of their own.

    Raises:
        MetricError: a state that was declared as a tensor is none.
    """
    plan.check_tensors()
    manifest = [node.updates for node in plan.nodes]
    parts: list[torch.Tensor] = []
    if not blocks_apart:
        parts += [_to_bytes(values) for values in block_values(plan)]
    for state in plan.listed:
        elements = given(plan.nodes[state.node], state, carried.get((state.node, state.name), ()))
        manifest.append(len(elements))
        parts += element_parts(elements, manifest)
    learnt = {place: found for place, node in enumerate(plan.nodes) if node.updates and (found := node.learnt())}
    manifest.append(len(learnt) > 0)
    parts += element_parts([learnt] if learnt else [], manifest)
    return Packed(manifest, [part.to(device) for part in parts])


def unpack(plan: Plan, manifest: Sequence[int], payload: torch.Tensor, *, blocks_apart: bool) -> Unpacked:
    """What another rank's `pack` of an equal plan gave. Tensors are views of the payload."""
    at = 0
    blocks: list[torch.Tensor] = []
    if not blocks_apart:
        for block in plan.blocks:
            size = block.length * block.dtype.itemsize
            blocks.append(_from_bytes(payload[at : at + size], block.dtype, (block.length,)))
            at += padded(size)
    numbers = iter(manifest)
    updates = [next(numbers) for _ in plan.nodes]
    reader = elements_of(numbers, payload, at)
    listed = [[next(reader) for _ in range(next(numbers))] for _ in plan.listed]
    learnt = [next(reader) for _ in range(next(numbers))]
    return Unpacked(updates, blocks, listed, learnt[0] if learnt else {})


def element_parts(elements: Iterable[Any], manifest: list[int]) -> list[torch.Tensor]:
    """The bytes of tensors; what they are, and whatever is no tensor, is added to the manifest."""
    parts = []
    for element in elements:
        if isinstance(element, torch.Tensor):
            manifest += [_CODES[element.dtype], element.ndim, *element.shape]
            parts.append(_to_bytes(element.detach()))
        else:
            data = pickle.dumps(element)
            words = bytearray(data + bytes(-len(data) % 8))
            manifest += [_OBJECT, len(words) // 8, *memoryview(words).cast("q")]
    return parts


def elements_of(numbers: Iterator[int], payload: torch.Tensor, at: int) -> Iterator[Any]:
    """The elements that `element_parts` wrote, one after another: their manifest, and the payload from `at` on."""
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


@dataclass(frozen=True, slots=True)
class _Held:
    """What one rank says: its schema, and for each line of a state whether a batch entered it, its shape and type."""

    schema: Schema
    seen: tuple[bool, ...]
    forms: tuple[Form, ...]


def adopt(coordinator: Coordinator, plan: Plan) -> None:
    """Give the states of this rank's metrics that have seen nothing the shapes of other ranks.

    Raises:
        MetricMismatchError: ranks differ in more than that.
    """
    states = [(node, name) for node in plan.nodes for name in node.metric._defaults]
    values = [getattr(node.metric, name) for node, name in states]
    own = _Held(
        plan.schema,
        tuple(node.updates > 0 for node, _ in states),
        tuple(map(form_of, values)),
    )
    said: list[_Held] = coordinator.gather(own)
    models = _models(said)
    check_schemas([_as_models(each, said, models) for each in said])
    for at, (node, name) in enumerate(states):
        form, default = said[models[at]].forms[at], node.metric._defaults[name]
        if not own.seen[at] and form is not None and isinstance(default, torch.Tensor):
            shape, dtype = form
            device = getattr(node.metric, name).device
            with suppress(RuntimeError):
                setattr(node.metric, name, default.to(device, dtype).expand(shape).clone())


def _models(said: Sequence[_Held]) -> list[int]:
    """For each state the first rank that a batch entered it on, rank 0 where there is none."""
    count = min(len(each.seen) for each in said)
    return [next((rank for rank, each in enumerate(said) if each.seen[at]), 0) for at in range(count)]


def _as_models(held: _Held, said: Sequence[_Held], models: Sequence[int]) -> Schema:
    """A rank's schema if it took the shapes of others for what it has not seen."""
    taken = [
        said[model].schema[at] if not seen and said[model].schema[at][:3] == line[:3] else line
        for at, (line, seen, model) in enumerate(zip(held.schema, held.seen, models, strict=False))
    ]
    return (*taken, *held.schema[len(taken) :])
