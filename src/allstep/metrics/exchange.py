"""How ranks give each other their states: one gather for all of them, whatever they are.

Protocol. Each rank sends a frame: a head of five integers, the payload and the manifest, padded to a length that all
ranks know before, since a process group aborts when sizes differ. The head has the schema's fingerprint, so that ranks
that do not fit together find out from the very collective, and the lengths of what follows. Where some rank's frame did
not fit, all see so in the heads and gather once more at the length of the longest; next time that length is expected
from the beginning, as is room for states of fixed size. So these take one collective, and lists at most two. On an
accelerator the payload travels apart from the frame, so that the host never waits for the device: a frame on the host,
then the payload on the device. Blocks so large that all ranks' would fill memory are reduced, one collective for each
operation and type.

After: every rank has all ranks' states, or all raise the same error: MetricMismatchError where schemas differ by more
than the shapes of what a rank has not seen, which `adopt_shapes` mends and all gather again; MetricError where a rank
could not pack its own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import NamedTuple

import torch

from allstep.coordination import Coordinator, check_same
from allstep.errors import MetricError
from allstep.metrics.describe import Schema
from allstep.metrics.folding import fold, from_accumulator, to_accumulator
from allstep.metrics.packing import BlockWriter, Packed, Unmerged, Unpacked, block_rows, block_values, pack, unpack
from allstep.metrics.states import Form, ReductionPlan, StateBlock, form_of, padded

FIRST_FRAME = 4096
LARGEST_GATHER = 256 * 2**20
_GROWTH = 1.25  # lists grow from one event to the next; a frame with some room saves their second collective

_HEAD = struct.Struct("=5q")
_HEAD_BYTES = padded(_HEAD.size)


class _Head(NamedTuple):
    """What a frame begins with; lengths are in bytes, the manifest's in integers.

    `failed` says that this rank could not pack its states.
    """

    fingerprint: int
    frame: int
    manifest: int
    payload: int
    failed: int


@dataclass(frozen=True, slots=True)
class Gathered:
    """What all ranks gave, by a plan. `blocks` are reduced already, each flat; `ranks` has the rest, rank by rank."""

    plan: ReductionPlan
    blocks: list[torch.Tensor]
    ranks: list[Unpacked]


class Exchange:
    """The gathers of one event of one engine.

    Args:
        largest: bytes of all ranks' blocks above which these are reduced instead of gathered.
        fixed: bytes that states are known to take before any batch, the same on all ranks.
    """

    def __init__(self, largest: int = LARGEST_GATHER, fixed: int = 0) -> None:
        self._largest = largest
        self._fixed = fixed
        self._frame: int | None = None
        self._memory: _Memory | None = None

    @property
    def history(self) -> str:
        """What the next frame's length comes from; it differs where metrics were attached anew on some ranks only."""
        return "gathered for the first time" if self._frame is None else f"gathered in frames of {self._frame} bytes"

    def gather(
        self,
        coordinator: Coordinator,
        plan: ReductionPlan,
        unmerged: Unmerged,
        replan: Callable[[], ReductionPlan] | None = None,
    ) -> Gathered:
        """Give all ranks this rank's states and be given theirs.

        Args:
            coordinator: what the ranks meet through.
            plan: of this rank's states.
            unmerged: what loaded states brought along.
            replan: gives the plan anew after a rank has taken on shapes of others; by default that is not done.
        """
        apart = plan.block_bytes * coordinator.world_size > self._largest
        failure: Exception | None = None
        try:
            packed = pack(plan, unmerged)
        except Exception as error:  # whatever it is, the others have to hear of it
            packed, failure = Packed([], []), error
        frame = _Frame(plan, packed, has_blocks=not apart, failed=failure is not None)
        memory = self._memory_for(plan, self._expected(coordinator.world_size), coordinator.world_size)
        heads = frame.gather(coordinator, memory)
        # All ranks see the same heads, so that all take the same way from here on.
        if any(head.fingerprint != plan.fingerprint for head in heads):
            if replan is not None:
                adopt_shapes(coordinator, plan)
                return self.gather(coordinator, replan(), unmerged)
            check_same(coordinator.gather(plan.schema))
        if any(head.failed for head in heads):
            _raise_failures(coordinator, failure)
        # The manifest travels even where blocks are reduced apart: it has the numbers of batches.
        longest = max([head.frame for head in heads])
        if longest > memory.length:
            memory = _Memory(plan, longest, coordinator.world_size)
            heads = frame.gather(coordinator, memory)
        self._frame = padded(ceil(longest * _GROWTH)) if plan.gathered else longest
        # What is gathered is read where it arrived, and belongs to the results. Blocks are folded into new memory.
        self._memory = None if plan.gathered else memory
        payloads = memory.payloads if frame.on_host else _gather_payloads(coordinator, plan, frame, heads)
        manifests = memory.manifests(heads, behind_payload=frame.on_host)
        # Ranks that compute one batch together have the same states: one of them is counted.
        each = slice(None, None, coordinator.data.sharing)
        ranks = [
            unpack(plan, manifest, payload, at=frame.block_bytes)
            for manifest, payload in zip(manifests[each], payloads[each], strict=True)
        ]
        if apart:
            return Gathered(plan, _reduce_blocks(coordinator, plan), ranks)
        rows = memory.block_rows if frame.on_host else block_rows(plan, payloads)
        return Gathered(plan, _fold_blocks(plan, [of_block[each] for of_block in rows]), ranks)

    def _memory_for(self, plan: ReductionPlan, length: int, ranks: int) -> _Memory:
        # Taken away until all went well: what a failed exchange left under way may still write to it.
        memory, self._memory = self._memory, None
        if memory is None or memory.plan is not plan or memory.length != length:
            memory = _Memory(plan, length, ranks)
        return memory

    def _expected(self, world_size: int) -> int:
        """The length of the next frame, in bytes, which has to be the same on all ranks."""
        if self._frame is not None:
            return self._frame
        return FIRST_FRAME + (padded(self._fixed) if self._fixed * world_size <= self._largest else 0)


def travels_apart(device: torch.device) -> bool:
    """Whether the payload is gathered on its device and not in the frame, so that the host does not wait for it."""
    return device.type != "cpu"


class _Memory:
    """Where frames of one length are sent from and arrive, and the views of them that a plan needs.

    It outlives an event where it can, since making it costs more than using it.
    """

    def __init__(self, plan: ReductionPlan, length: int, ranks: int) -> None:
        self.plan = plan
        self.length = length
        # Short frames are cleared, so that no bytes of this process' memory travel beside them.
        is_short = length <= FIRST_FRAME
        self.sent = torch.zeros(length, dtype=torch.uint8) if is_short else torch.empty(length, dtype=torch.uint8)
        self.bytes = self.sent.numpy().data
        self.rows = torch.empty((ranks, length), dtype=torch.uint8)
        self._row_words = self.rows.view(torch.int64).numpy()
        self.payloads = self.rows[:, _HEAD_BYTES:]

    @cached_property
    def block_writer(self) -> BlockWriter:
        """Writes blocks into the frame that is sent; for frames that they fit into."""
        return BlockWriter(self.plan, self.sent[_HEAD_BYTES:])

    @cached_property
    def block_rows(self) -> list[list[torch.Tensor]]:
        """What arrived of each block, rank by rank."""
        return block_rows(self.plan, self.payloads)

    def heads(self) -> list[_Head]:
        """What arrived first of each rank."""
        return [_Head(*words) for words in self._row_words[:, : len(_Head._fields)].tolist()]

    def manifests(self, heads: Sequence[_Head], *, behind_payload: bool) -> list[list[int]]:
        """What arrived last of each rank."""
        found = []
        for head, words in zip(heads, self._row_words, strict=True):
            at = (_HEAD_BYTES + behind_payload * head.payload) // words.itemsize
            found.append(words[at : at + head.manifest].tolist())
        return found


class _Frame:
    """What a rank sends: a head, the payload where it travels with it, and the manifest; `size` bytes in all."""

    def __init__(self, plan: ReductionPlan, packed: Packed, *, has_blocks: bool, failed: bool) -> None:
        self.on_host = not travels_apart(plan.device)
        self.block_bytes = plan.block_bytes if has_blocks else 0
        self.packed = packed
        payload = self.block_bytes + packed.size
        self._manifest_at = _HEAD_BYTES + (payload if self.on_host else 0)
        self.size = self._manifest_at + padded(8 * len(packed.manifest))
        self._head = _Head(plan.fingerprint, self.size, len(packed.manifest), payload, failed)

    def gather(self, coordinator: Coordinator, memory: _Memory) -> list[_Head]:
        """Send all of it, or, where it does not fit, its head alone; the heads of all ranks."""
        _HEAD.pack_into(memory.bytes, 0, *self._head)
        if self.size <= memory.length:
            manifest = self.packed.manifest
            struct.pack_into(f"={len(manifest)}q", memory.bytes, self._manifest_at, *manifest)
            if self.on_host:
                if self.block_bytes:
                    memory.block_writer.write()
                self.packed.write(memory.sent, _HEAD_BYTES + self.block_bytes)
        coordinator.gather_bytes(memory.sent, memory.rows)
        return memory.heads()


def _gather_payloads(
    coordinator: Coordinator, plan: ReductionPlan, frame: _Frame, heads: Sequence[_Head]
) -> torch.Tensor:
    longest = max(head.payload for head in heads)
    buffer = torch.empty(longest, dtype=torch.uint8, device=plan.device)
    # Nothing to gather, on any rank.
    if longest == 0:
        return buffer.expand(len(heads), 0)
    if frame.block_bytes:
        BlockWriter(plan, buffer).write()
    frame.packed.write(buffer, frame.block_bytes)
    return coordinator.gather_bytes(buffer)


def _fold_blocks(plan: ReductionPlan, by_block: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    return [_fold_block(plan, block, rows) for block, rows in zip(plan.blocks, by_block, strict=True)]


def _fold_block(plan: ReductionPlan, block: StateBlock, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    try:
        return fold(rows, block.op)
    except RuntimeError as error:  # an operation that there is not for the type
        states = ", ".join(f"{plan.nodes[state.node].name!r}, state {state.name!r}" for state in block.states)
        raise MetricError(
            f"{block.op} of {block.dtype} cannot be reduced over ranks: metric {states}: {error}"
        ) from error


def _reduce_blocks(coordinator: Coordinator, plan: ReductionPlan) -> list[torch.Tensor]:
    reduced = []
    for block, values in zip(plan.blocks, block_values(plan), strict=True):
        total = to_accumulator(values, block.op)
        if coordinator.data.is_twin and block.op == "sum":  # the rank with the same batches adds them
            total.zero_()
        # Gloo reduces no complex numbers; adding their parts is the same sum.
        flat = torch.view_as_real(total) if total.is_complex() else total
        summed = coordinator.reduce_tensor(flat, block.op)
        summed = torch.view_as_complex(summed) if total.is_complex() else summed
        reduced.append(from_accumulator(summed, block.dtype, block.op))
    return reduced


def _raise_failures(coordinator: Coordinator, failure: Exception | None) -> None:
    texts = coordinator.gather(None if failure is None else repr(failure))
    ranks = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None)
    raise MetricError(f"states of metrics could not be sent: {ranks}") from failure


# States of a rank that has seen nothing, in the shapes and types that updates gave them on other ranks. Some metrics
# begin with a number and make it a row at the first update (torchmetrics' `R2Score` of several outputs), so that ranks
# that have taken batches differ from those that have not.


@dataclass(frozen=True, slots=True)
class _RankForms:
    """What one rank says: its schema, and for each line of a state whether a batch entered it, its shape and type."""

    schema: Schema
    seen: tuple[bool, ...]
    forms: tuple[Form, ...]


def adopt_shapes(coordinator: Coordinator, plan: ReductionPlan) -> None:
    """Give the states of this rank's metrics that have seen nothing the shapes of other ranks.

    Called on all ranks when their schemas differ. What a metric without a batch holds is its default, which is as well
    spread over the shape of the others. A default that cannot be spread so is left, and shows in the next comparison.

    Raises:
        MetricMismatchError: ranks differ in more than that.
    """
    states = [(node, name) for node in plan.nodes for name in node.defaults]
    own = _RankForms(
        plan.schema,
        tuple(node.updates > 0 for node, _ in states),
        tuple(form_of(getattr(node.metric, name)) for node, name in states),
    )
    by_rank: list[_RankForms] = coordinator.gather(own)
    models = _models(by_rank)
    check_same([_as_models(each, by_rank, models) for each in by_rank])
    for at, (node, name) in enumerate(states):
        form, default = by_rank[models[at]].forms[at], node.defaults[name]
        if not own.seen[at] and form is not None and isinstance(default, torch.Tensor):
            shape, dtype = form
            device = getattr(node.metric, name).device
            # A default that cannot be spread over the shape is left; the next comparison of schemas names it.
            with suppress(RuntimeError):
                setattr(node.metric, name, default.to(device, dtype).expand(shape).clone())


def _models(by_rank: Sequence[_RankForms]) -> list[int]:
    """For each state the first rank that a batch entered it on, rank 0 where there is none."""
    count = min(len(each.seen) for each in by_rank)
    return [next((rank for rank, each in enumerate(by_rank) if each.seen[at]), 0) for at in range(count)]


def _as_models(own: _RankForms, by_rank: Sequence[_RankForms], models: Sequence[int]) -> Schema:
    """A rank's schema if it took the shapes of others for what it has not seen."""
    taken = [
        by_rank[model].schema[at] if not seen and by_rank[model].schema[at][:3] == line[:3] else line
        for at, (line, seen, model) in enumerate(zip(own.schema, own.seen, models, strict=False))
    ]
    return (*taken, *own.schema[len(taken) :])
