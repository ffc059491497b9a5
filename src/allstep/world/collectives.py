"""Collectives of tensors, numbers and objects, with a meaning in a world of one.

Contract: every rank calls the same method at the same point. Inputs are left as they are, results are new. Nothing
passes through a type that could round it: numbers and gathered tensors travel as their own bits. `all_gather`,
`broadcast`, `gather_objects` and all collectives of numbers first exchange what each rank has, so shapes may differ,
and what one rank cannot send raises the same CollectiveError on all. `all_reduce` of a tensor is one collective with
nothing before it: shapes and dtypes must be the same on all ranks. With one rank no process group is used.

What the host has to read never goes over the device: numbers, objects, refusals and all headers go over a group of the
host. To read them from the device the host would wait until everything before them in the device's queue is done.
Tensors go over the device, where some rank's is on it, and nothing waits for them.

`NamedWaits` says to the monitoring service in which collective a rank waits for the others, so that ranks which wait in
different places can be told apart: `all_reduce #3 at train.py:57` is the third collective of this World, called there.
On ranks that act alike number and name are the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist

from allstep.errors import CollectiveError
from allstep.protocol.heartbeat import RankActivity
from allstep.world.payload import (
    HEADER_LENGTH,
    Payload,
    PayloadKind,
    data_size,
    decode,
    encode,
    encode_object,
    from_header,
    is_on_device,
    lack_of,
    refusal,
)

Op = Literal["sum", "mean", "min", "max", "product"]
Number = bool | int | float

_REDUCE = {"sum": "SUM", "mean": "SUM", "min": "MIN", "max": "MAX", "product": "PRODUCT"}


_HOST = torch.device("cpu")


class Collectives:
    """The collectives of one rank.

    Args:
        rank, world_size: this rank, among how many.
        device: where results go that have no input of their own to follow.
        transport: where a tensor must be for the default group to carry it.
        host_group: gives the group that carries what is on the host; by default that is the default one.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device,
        transport: torch.device,
        host_group: Callable[[], dist.ProcessGroup | None] | None = None,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._transport = transport
        self._host_group = host_group if host_group is not None else _default_group

    def all_reduce(self, x: torch.Tensor | Number, op: Op) -> Any:
        """See `World.all_reduce`."""
        if op not in get_args(Op):
            raise CollectiveError(f'op is {op!r}; it must be one of "sum", "mean", "min", "max", "product"')
        if isinstance(x, torch.Tensor):
            return self._reduce_tensor(x, op)
        return fold(cast(list[Number], self._gather_values(encode(x), "all_reduce")), op)

    def all_gather(self, x: torch.Tensor | Number) -> list[Any]:
        """See `World.all_gather`."""
        return self._gather_values(encode(x), "all_gather", _device_of(x, self._device))

    def gather_objects(self, value: object) -> list[Any]:
        """See `World.gather_objects`."""
        return self._gather_values(encode_object(value), "gather_objects")

    def barrier(self) -> None:
        """See `World.barrier`. A gather over the host, which reads the result."""
        self._gather_values(encode(0), "barrier")

    def broadcast(self, x: torch.Tensor | Number | None, src: int) -> Any:
        """See `World.broadcast`."""
        if not 0 <= src < self._world_size:
            raise CollectiveError(f"src is {src}; it must be a rank, from 0 to {self._world_size - 1}")
        payload = self._broadcast_payload(encode(x) if self._rank == src else None, src)
        _raise_refused([payload], "broadcast", first_rank=src)
        return decode(payload, _device_of(x, self._device))

    def _reduce_tensor(self, x: torch.Tensor, op: Op) -> torch.Tensor:
        if lack := lack_of(x):
            raise CollectiveError(f"all_reduce on rank {self._rank} was given {lack}")
        carrier, result = _dtypes(x, op)
        # Always a copy, in one piece: the backend reduces in place, and what was given is left as it is.
        where = self._transport if self._world_size > 1 else x.device
        work = x.detach().to(where, carrier, copy=True, memory_format=torch.contiguous_format)
        if self._world_size > 1 and work.numel():
            # Backends do not add complex numbers; as pairs of real ones they do.
            flat = torch.view_as_real(work) if work.is_complex() else work
            dist.all_reduce(flat, op=getattr(dist.ReduceOp, _REDUCE[op]))
        if op == "mean":
            # An exact sum of integers is divided as floats; complex and float sums are divided as they are.
            work = work.to(result) if not carrier.is_floating_point and not carrier.is_complex else work
            work /= self._world_size
        return work.to(x.device, result)

    def _gather_values(self, payload: Payload, name: str, device: torch.device | None = None) -> list[Any]:
        payloads = self._gather_payloads(payload)
        _raise_refused(payloads, name)
        return [decode(each, device or self._device) for each in payloads]

    def _gather_payloads(self, payload: Payload) -> list[Payload]:
        if self._world_size == 1:
            return [payload]
        # First the headers, whose size all ranks know; then the bytes, whose sizes the headers say.
        own = torch.tensor(payload.header(), dtype=torch.int64)
        rows = [torch.empty_like(own) for _ in range(self._world_size)]
        dist.all_gather(rows, own, group=self._host_group())
        headers = torch.stack(rows).tolist()
        longest = max(data_size(header) for header in headers)
        if longest == 0:
            return [from_header(header, payload.data) for header in headers]
        where, group = self._way_of(headers)
        # Gathered tensors must have one size, so all are as long as the longest.
        padded = torch.zeros(longest, dtype=torch.uint8, device=where)
        padded[: payload.data.numel()] = payload.data.to(where)
        gathered = [torch.empty_like(padded) for _ in range(self._world_size)]
        dist.all_gather(gathered, padded, group=group)
        return [from_header(header, data) for header, data in zip(headers, gathered, strict=True)]

    def _broadcast_payload(self, payload: Payload | None, src: int) -> Payload:
        if self._world_size == 1:
            assert payload is not None
            return payload
        header = [0] * HEADER_LENGTH if payload is None else payload.header()
        row = torch.tensor(header, dtype=torch.int64)
        dist.broadcast(row, src, group=self._host_group())
        header = row.tolist()
        where, group = self._way_of([header])
        if payload is None:
            data = torch.empty(data_size(header), dtype=torch.uint8, device=where)
        else:
            data = payload.data.to(where)
        if data.numel():
            dist.broadcast(data, src, group=group)
        return from_header(header, data)

    def _way_of(self, headers: Sequence[Sequence[int]]) -> tuple[torch.device, dist.ProcessGroup | None]:
        """Where the data of these headers, which all ranks have, must be to travel, and the group that carries it."""
        if self._transport.type != "cpu" and any(map(is_on_device, headers)):
            return self._transport, None
        return _HOST, self._host_group()


def _default_group() -> None:
    """The default group, as torch's collectives name it."""


def _device_of(x: object, otherwise: torch.device) -> torch.device:
    return x.device if isinstance(x, torch.Tensor) else otherwise


def _raise_refused(payloads: list[Payload], name: str, first_rank: int = 0) -> None:
    for rank, payload in enumerate(payloads, first_rank):
        if payload.kind is PayloadKind.REFUSED:
            raise CollectiveError(f"{name} on rank {rank} was given {refusal(payload)}")


def _dtypes(x: torch.Tensor, op: Op) -> tuple[torch.dtype, torch.dtype]:
    """In which dtype a tensor is reduced, so that nothing is lost on the way, and which the result has."""
    if x.is_complex():
        if op not in ("sum", "mean"):
            raise CollectiveError(f'op is {op!r}, but x is complex ({x.dtype}); complex tensors have "sum" and "mean"')
        return x.dtype, x.dtype
    if x.is_floating_point():
        return (x.dtype if x.dtype.itemsize >= 4 else torch.float32), x.dtype
    if x.dtype == torch.uint64:
        raise CollectiveError("x is uint64, which int64 cannot carry; convert it to int64 or float64 yourself")
    # MPS has no float64.
    if op == "mean":
        return torch.int64, torch.float32 if x.device.type == "mps" else torch.float64
    return torch.int64, x.dtype if op in ("min", "max") else torch.int64


class NamedWaits:
    """The waits of one World, counted and named for its `activity`."""

    def __init__(self, activity: RankActivity) -> None:
        self._activity = activity
        self._count = 0

    def at(self, name: str) -> AbstractContextManager[None]:
        """Wait in the collective `name` for the length of a with block."""
        self._count += 1
        return self._activity.wait(f"{name} #{self._count}{_calling_line()}")


def _calling_line() -> str:
    """The line that called into this package, such as " at train.py:57"; nothing where Python does not tell."""
    frame = inspect.currentframe()
    # contextlib's frames lie between a `with` statement and a method that is a context manager.
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("allstep.world.", "contextlib")):
        frame = frame.f_back
    return "" if frame is None else f" at {frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


def fold(numbers: Sequence[Number], op: Op) -> Number:
    """Reduce the ranks' numbers.

    `sum` and `product` of bools and ints are exact ints; `mean` is a float, rounded once from the exact sum of ints;
    `min` and `max` return one of the numbers, or NaN if there is one.
    """
    if op == "sum":
        return _sum(numbers)
    if op == "product":
        return math.prod(numbers)
    if op == "mean":
        return _sum(numbers) / len(numbers)
    # Python's min and max keep or lose a NaN by its place, so it is looked for.
    for number in numbers:
        if math.isnan(number):
            return number
    return min(numbers) if op == "min" else max(numbers)


def _sum(numbers: Sequence[Number]) -> int | float:
    if not any(isinstance(number, float) for number in numbers):
        return sum(numbers)
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):  # fsum refuses opposite infinities and sums beyond the range of floats
        return sum(map(float, numbers))
