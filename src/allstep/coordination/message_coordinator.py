"""Agreement by messages with a tag, over a gloo group that others use too, from any thread.

Gloo matches the collectives of a group by the order in which each rank issues them. So two threads cannot share a
group for collectives: one rank may issue a save's before a vote, and another after it. Messages are matched by sender
and tag, whatever else is under way. So what a save's thread agrees on goes by messages under a tag of its own, and no
second full mesh of connections has to be opened for it.

Contract: one thread at a time uses a `MessageCoordinator`, and all ranks call the same methods in the same order.
Values go around in a ring, each rank passing on what it was last given: as many steps, and as many bytes, as gloo's own
gather takes. What can go wrong: a rank that is gone, or that does not come within `timeout` seconds, is a RuntimeError.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from allstep.coordination.coordinator import KnownSum, ReduceOp
from allstep.placement import DataRanks

FIRST_TAG = 16
"""Below are the tags of messages that are sent outside of here."""


class MessageCoordinator:
    """Agreement among the ranks of a gloo group by messages.

    Args:
        group: gives the group. Called at each use; the first one is the main thread's, where the group is opened.
        rank, world_size: this rank, among how many.
        tag: of the messages; no other coordinator of this group has it.
        timeout: seconds that a rank waits for a message.
    """

    def __init__(
        self, group: Callable[[], dist.ProcessGroup], rank: int, world_size: int, *, tag: int, timeout: float
    ) -> None:
        self._group = group
        self._tag = tag
        self._timeout = timedelta(seconds=timeout)
        self.rank = rank
        self.world_size = world_size
        self.data = DataRanks.of(rank, world_size)

    def vote(self, vector: Sequence[int]) -> KnownSum:
        """The sum, which is known when this returns."""
        return KnownSum([sum(column) for column in zip(*self.gather(list(vector)), strict=True)])

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, pickled."""
        blocks = [b""] * self.world_size
        blocks[self.rank] = pickle.dumps(value)
        right, left = (self.rank + 1) % self.world_size, (self.rank - 1) % self.world_size
        for step in range(1, self.world_size):
            sending = self._send(blocks[(self.rank - step + 1) % self.world_size], right)
            blocks[(self.rank - step) % self.world_size] = self._receive(left)
            self._finish(sending)
        return [pickle.loads(block) for block in blocks]

    def gather_bytes(self, buffer: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Every rank's bytes."""
        gathered = torch.stack([each.to(buffer.device) for each in self.gather(buffer.cpu())])
        return gathered if rows is None else rows.copy_(gathered)

    def reduce_tensor(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """A tensor of each rank, reduced in rank order."""
        rows: list[torch.Tensor] = self.gather(tensor.cpu())
        total, *others = (row.to(tensor.device) for row in rows)
        for each in others:
            if op == "sum":
                total = total + each
            else:
                total = torch.maximum(total, each) if op == "max" else torch.minimum(total, each)
        return total

    def broadcast(self, value: Any, source: int) -> Any:
        """The value of one rank, pickled."""
        if self.rank != source:
            return pickle.loads(self._receive(source))
        block = pickle.dumps(value)
        others = [rank for rank in range(self.world_size) if rank != source]
        for sending in [self._send(block, rank) for rank in others]:
            self._finish(sending)
        return pickle.loads(block)

    def _send(self, block: bytes, target: int) -> list[tuple[dist.Work, torch.Tensor]]:
        """Send how long a block is, and the block; what is given back is alive until it has been sent."""
        size = torch.tensor([len(block)], dtype=torch.int64)
        data = torch.frombuffer(bytearray(block), dtype=torch.uint8)
        return [(self._group().send([each], target, self._tag), each) for each in (size, data)]

    def _finish(self, sending: Sequence[tuple[dist.Work, torch.Tensor]]) -> None:
        for work, _ in sending:
            work.wait(self._timeout)

    def _receive(self, source: int) -> bytes:
        size = torch.empty(1, dtype=torch.int64)
        self._group().recv([size], source, self._tag).wait(self._timeout)
        data = torch.empty(int(size), dtype=torch.uint8)
        self._group().recv([data], source, self._tag).wait(self._timeout)
        return data.numpy().tobytes()
