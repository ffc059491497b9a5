"""The coordinator of a process group: agreement among the ranks of a world.

Contract: made by `World` on every rank, over a gloo group that carries no gradients, so that a vote never waits behind
them. The group is opened at the first use. Gloo matches collectives by order, so all are issued from the main thread;
what another thread has to agree on goes by messages (`by_messages`). Tensors go over the world's default group where
that takes their device. On nccl the host does not wait for them, and a rank that votes meanwhile is
not mistaken for one that sends tensors. What can go wrong: a rank that never comes leaves the others waiting until the
group's time limit, which raises.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from allstep.coordination.coordinator import ReduceOp
from allstep.coordination.message_coordinator import FIRST_TAG, MessageCoordinator
from allstep.coordination.torch_private import unrecorded
from allstep.placement import DataRanks
from allstep.protocol.heartbeat import RankActivity

_SECTION = "agreement"  # what the monitor is told that a rank waits in
_TAG = 7  # of messages between ranks, so that none is taken for a user's own, which have 0 where not said


class _VoteSum:
    __slots__ = ("_activity", "_tensor", "_work")

    def __init__(self, tensor: torch.Tensor, work: dist.Work, activity: RankActivity) -> None:
        self._tensor = tensor
        self._work = work
        self._activity = activity

    def wait(self) -> list[int]:
        with self._activity.wait(_SECTION):
            self._work.wait()
        return self._tensor.tolist()


class GroupCoordinator:
    """Agreement among all ranks, over a gloo group.

    Args:
        group: gives the group, which it opens when it is first called: on all ranks at the same point.
        rank: this rank.
        world_size: how many ranks there are.
        activity: is told when this rank waits.
        device_type: of the tensors which the default process group takes.
        sharing: so many neighbours are given the same batches.
    """

    def __init__(
        self,
        group: Callable[[], dist.ProcessGroup],
        rank: int,
        world_size: int,
        activity: RankActivity | None = None,
        *,
        device_type: str = "cpu",
        sharing: int = 1,
    ) -> None:
        self._open_group = group
        self._activity = RankActivity() if activity is None else activity
        self._device_type = device_type
        self._tags = count(FIRST_TAG)
        self.rank = rank
        self.world_size = world_size
        self.data = DataRanks.of(rank, world_size, sharing)

    def by_messages(self, timeout: float) -> MessageCoordinator:
        """For another thread, or waits of another length: agreement over the same group that no order binds to this.

        Args:
            timeout: seconds that a rank waits for another.
        """
        return MessageCoordinator(self._open_group, self.rank, self.world_size, tag=next(self._tags), timeout=timeout)

    @cached_property
    def _group(self) -> dist.ProcessGroup:
        with self._activity.wait(_SECTION):  # for the ranks that it is opened with
            return self._open_group()

    def vote(self, vector: Sequence[int]) -> _VoteSum:
        """One asynchronous reduction of the vector."""
        # On the host, whatever the world's device: a vote must not make the host wait for the device's queue.
        tensor = torch.tensor(vector, dtype=torch.int64)
        work = unrecorded(lambda: dist.all_reduce(tensor, group=self._group, async_op=True))
        assert work is not None
        return _VoteSum(tensor, work, self._activity)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, pickled."""
        values: list[Any] = [None] * self.world_size
        with self._activity.wait(_SECTION):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def gather_bytes(self, buffer: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """One exchange: on an accelerator a collective, on the host a message to each other rank."""
        sent, group = self._ready(buffer)
        if rows is None or rows.device != sent.device:
            received = torch.empty((self.world_size, *sent.shape), dtype=sent.dtype, device=sent.device)
        else:
            received = rows
        with self._activity.wait(_SECTION):
            if sent.device.type == "cpu":
                self._send_to_all(sent, received, group)
            else:
                dist.all_gather(list(received.unbind()), sent, group=group)
        if rows is None or rows is received:
            return received.to(buffer.device)
        return rows.copy_(received)

    def _send_to_all(self, sent: torch.Tensor, rows: torch.Tensor, group: dist.ProcessGroup | None) -> None:
        # Gloo gathers in a ring, each rank waiting for its neighbour world_size - 1 times. All messages at once wait
        # once, and carry the same bytes: a third of the time for small buffers over four ranks that share two cores.
        # By the group's own methods: what `isend` and `irecv` check first takes as long as a small message.
        group = dist.group.WORLD if group is None else group
        assert group is not None  # only where there is no world
        sends, receives, every = [], [], rows.unbind()
        for step in range(1, self.world_size):
            target, source = (self.rank + step) % self.world_size, (self.rank - step) % self.world_size
            sends.append(group.send([sent], target, _TAG))
            receives.append(group.recv([every[source]], source, _TAG))
        every[self.rank].copy_(sent)
        # What others sent arrives last, mostly: to wait for the own messages first would wake this thread twice.
        for work in (*receives, *sends):
            work.wait()

    def reduce_tensor(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """One collective."""
        sent, group = self._ready(tensor)
        sent = sent.clone() if sent is tensor else sent  # all_reduce writes into what it is given
        with self._activity.wait(_SECTION):
            dist.all_reduce(sent, op=getattr(dist.ReduceOp, op.upper()), group=group)
        return sent.to(tensor.device)

    def _ready(self, tensor: torch.Tensor) -> tuple[torch.Tensor, dist.ProcessGroup | None]:
        """The tensor where a group carries it, and that group; None is the default one."""
        if tensor.device.type == self._device_type:
            return tensor.contiguous(), None
        return tensor.cpu().contiguous(), None if self._device_type == "cpu" else self._group

    def broadcast(self, value: Any, source: int) -> Any:
        """The value of rank `source` of the group, pickled; tensors of an accelerator arrive on the receiver's own."""
        values = [_packed(value) if source == self.rank else None]
        origin = dist.get_global_rank(self._group, source)
        with self._activity.wait(_SECTION):
            dist.broadcast_object_list(values, src=origin, group=self._group, device=torch.device("cpu"))
        assert values[0] is not None
        return pickle.loads(values[0])


class _Packer(pickle.Pickler):
    """Pickles a tensor of an accelerator with its kind of device alone: the sender's index is another rank's device."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.device.type not in ("cpu", "meta"):
            return _on_own_device, (obj.detach().cpu(), obj.device.type)
        return NotImplemented


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Packer(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _on_own_device(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    return tensor.to(torch.device(kind))
