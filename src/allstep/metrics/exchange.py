"""How ranks give each other their states: one gather for all of them, whatever they are.

Protocol. Each rank sends a frame: a head of five integers, the manifest and the payload, padded to a length that all
ranks know before, since a process group aborts when sizes differ. The head has the schema's fingerprint, so that ranks
that do not fit together find out from the very collective, and the lengths of what follows. Where some rank's frame did
not fit, all see so in the heads and gather once more at the length of the longest; next time that length is expected
from the beginning, as is room for states of fixed size. So these take one collective, and lists at most two. On an
accelerator the payload travels apart from the frame, so that the host never waits for the device: a frame on the host,
then the payload on the device. Blocks so large that all ranks' would fill memory are reduced, one collective for each
operation and type.

After: every rank has all ranks' states, or all raise the same error: MetricMismatchError where schemas differ by more
than the shapes of what a rank has not seen, which `adopt` mends and all gather again; MetricError where a rank
could not pack its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch

from allstep.coordination import Coordinator, check_schemas
from allstep.errors import MetricError
from allstep.metrics.folding import fold, from_carrier, to_carrier
from allstep.metrics.packing import ALIGNMENT, Carried, Packed, Unpacked, adopt, block_values, pack, padded, unpack
from allstep.metrics.states import Block, Plan

FIRST_FRAME = 4096
LARGEST_GATHER = 256 * 2**20
_GROWTH = 1.25

_HEAD = 5
_HEAD_BYTES = padded(_HEAD * 8)


@dataclass(frozen=True, slots=True)
class _Head:
    """What a frame begins with. `failed` says that this rank could not pack its states."""

    fingerprint: int
    frame: int
    manifest: int
    payload: int
    failed: int


@dataclass(frozen=True, slots=True)
class Gathered:
    """What all ranks gave. `blocks` are reduced already, each flat; `ranks` has the rest, rank by rank."""

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

    @property
    def history(self) -> str:
        """What the next frame's length comes from; it differs where metrics were attached anew on some ranks only."""
        return "gathered for the first time" if self._frame is None else f"gathered in frames of {self._frame} bytes"

    def _expected(self, world_size: int) -> int:
        """The length of the next frame, in bytes, which has to be the same on all ranks."""
        if self._frame is not None:
            return self._frame
        return FIRST_FRAME + (padded(self._fixed) if self._fixed * world_size <= self._largest else 0)

    def gather(
        self, coordinator: Coordinator, plan: Plan, carried: Carried, replan: Callable[[], Plan] | None = None
    ) -> Gathered:
        """Give all ranks this rank's states and be given theirs.

        Args:
            coordinator: what the ranks meet through.
            plan: of this rank's states.
            carried: what loaded states brought along.
            replan: gives the plan anew after a rank has taken on shapes of others; by default that is not done.
        """
        device = plan.device
        apart = self._are_large(plan, coordinator.world_size)
        failure: Exception | None = None
        try:
            packed = pack(plan, device, carried, blocks_apart=apart)
        except Exception as error:  # whatever it is, the others have to hear of it
            packed, failure = Packed([], []), error
        on_host = not _travels_apart(device)
        manifest = torch.tensor(packed.manifest, dtype=torch.int64).view(torch.uint8)
        within = packed.size if on_host else 0
        size = _HEAD_BYTES + padded(manifest.numel()) + within
        head = _Head(plan.fingerprint, size, len(packed.manifest), packed.size, failure is not None)

        def frame(length: int) -> torch.Tensor:
            return _frame(length, head, manifest, packed if on_host else None)

        rows, heads = self._gather_frames(coordinator, frame)
        if any(each.fingerprint != heads[0].fingerprint for each in heads):
            if replan is not None:
                adopt(coordinator, plan)
                return self.gather(coordinator, replan(), carried)
            check_schemas(coordinator.gather(plan.schema))
        if any(each.failed for each in heads):
            _say_failed(coordinator, failure)
        longest = max(each.frame for each in heads)
        if longest > rows.shape[1]:
            rows = coordinator.gather_bytes(frame(longest))
        self._frame = padded(ceil(longest * _GROWTH)) if plan.listed else longest
        payloads = _payloads_in(rows, heads) if on_host else _gather_payloads(coordinator, packed, heads, device)
        ranks = [
            unpack(plan, _manifest_in(row, each), payload, blocks_apart=apart)
            for row, each, payload in zip(rows, heads, payloads, strict=True)
        ]
        if apart:
            return Gathered(_reduce_blocks(coordinator, plan), ranks)
        return Gathered(_fold_blocks(plan, ranks), ranks)

    def _gather_frames(
        self, coordinator: Coordinator, frame: Callable[[int], torch.Tensor]
    ) -> tuple[torch.Tensor, list[_Head]]:
        rows = coordinator.gather_bytes(frame(self._expected(coordinator.world_size)))
        numbers = rows[:, : _HEAD * 8].contiguous().view(torch.int64).tolist()
        return rows, [_Head(*each) for each in numbers]

    def _are_large(self, plan: Plan, world_size: int) -> bool:
        size = sum(block.length * block.dtype.itemsize for block in plan.blocks)
        return size * world_size > self._largest


def _travels_apart(device: torch.device) -> bool:
    """Whether the payload is gathered on its device, so that the host does not wait for it."""
    return device.type != "cpu"


def _frame(length: int, head: _Head, manifest: torch.Tensor, packed: Packed | None) -> torch.Tensor:
    """A frame of `length` bytes: all of it, or, where it does not fit, its head alone."""
    buffer = torch.zeros(length, dtype=torch.uint8) if length <= FIRST_FRAME else torch.empty(length, dtype=torch.uint8)
    numbers = (head.fingerprint, head.frame, head.manifest, head.payload, head.failed)
    buffer[: _HEAD * 8] = torch.tensor(numbers, dtype=torch.int64).view(torch.uint8)
    if head.frame <= length:
        buffer[_HEAD_BYTES : _HEAD_BYTES + manifest.numel()] = manifest
        if packed is not None:
            packed.write(buffer[_HEAD_BYTES + padded(manifest.numel()) :])
    return buffer


def _manifest_in(row: torch.Tensor, head: _Head) -> Sequence[int]:
    numbers: list[int] = row[_HEAD_BYTES : _HEAD_BYTES + head.manifest * 8].view(torch.int64).tolist()
    return numbers


def _payloads_in(rows: torch.Tensor, heads: Sequence[_Head]) -> list[torch.Tensor]:
    begins = [_HEAD_BYTES + padded(head.manifest * 8) for head in heads]
    return [row[at : at + head.payload] for row, at, head in zip(rows, begins, heads, strict=True)]


def _gather_payloads(
    coordinator: Coordinator, packed: Packed, heads: Sequence[_Head], device: torch.device
) -> list[torch.Tensor]:
    longest = max(head.payload for head in heads)
    if longest == 0:
        return [torch.empty(0, dtype=torch.uint8, device=device) for _ in heads]
    buffer = torch.empty(longest, dtype=torch.uint8, device=device)
    packed.write(buffer)
    return list(coordinator.gather_bytes(buffer))


def _fold_blocks(plan: Plan, ranks: Sequence[Unpacked]) -> list[torch.Tensor]:
    return [_fold_block(plan, block, [rank.blocks[at] for rank in ranks]) for at, block in enumerate(plan.blocks)]


def _fold_block(plan: Plan, block: Block, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    try:
        return fold(rows, block.op)
    except RuntimeError as error:  # an operation that there is not for the type
        states = ", ".join(f"{plan.nodes[state.node].name!r}, state {state.name!r}" for state in block.states)
        raise MetricError(
            f"{block.op} of {block.dtype} cannot be reduced over ranks: metric {states}: {error}"
        ) from error


def _reduce_blocks(coordinator: Coordinator, plan: Plan) -> list[torch.Tensor]:
    reduced = []
    for block, values in zip(plan.blocks, block_values(plan), strict=True):
        carried = to_carrier(values, block.op)
        flat = torch.view_as_real(carried) if carried.is_complex() else carried
        total = coordinator.reduce_tensor(flat, block.op)
        total = torch.view_as_complex(total) if carried.is_complex() else total
        reduced.append(from_carrier(total, block.dtype, block.op))
    return reduced


def _say_failed(coordinator: Coordinator, failure: Exception | None) -> None:
    said = coordinator.gather(None if failure is None else repr(failure))
    ranks = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None)
    raise MetricError(f"states of metrics could not be sent: {ranks}") from failure


assert _HEAD_BYTES % ALIGNMENT == 0
