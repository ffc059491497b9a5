"""Collectives for tensors and numbers, with a meaning in a world of one.

Contract: every rank calls the same method at the same point. Inputs are left as they are, results are new. Nothing
passes through a type that could round it: numbers and gathered tensors travel as their own bits. `all_gather`,
`broadcast`, `gather_objects` and all collectives of numbers first exchange what each rank has, so shapes may differ,
and what one rank cannot send raises the same CollectiveError on all. `all_reduce` of a tensor is one collective with
nothing before it: shapes and dtypes must be the same on all ranks. With one rank no process group is used.

The doors of World to its collectives: open or an error, and named while this rank waits in one.

Contract: `World` builds on this. Every rank calls the same method at the same point; what crosses is `collectives`'.

Naming what a rank waits for its peers in, so that ranks which wait in different places can be told apart.

Contract: each method of World that meets the other ranks enters what `Waits.at` gives for its name. The pulse then
says, as long as it lasts, what it is, the how-manieth meeting of this World, and from where it was called: `all_reduce
#3 at train.py:57`. On ranks that are together number and name are the same.

Reducing one Python number from each rank: a pure function of the numbers in rank order.

Integers stay integers of any size; float sums are rounded once (`math.fsum`), so the result depends neither on the
order of the ranks nor on how a backend adds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, Literal, TypeVar, cast, get_args, overload

import torch
import torch.distributed as dist

from allstep.errors import CollectiveError, WorldError
from allstep.protocol.heartbeat import RankActivity
from allstep.world.payload import (
    HEADER_LENGTH,
    Kind,
    Part,
    decode,
    encode,
    encode_object,
    from_header,
    payload_size,
    refusal,
)

_REDUCE = {"sum": "SUM", "mean": "SUM", "min": "MIN", "max": "MAX", "product": "PRODUCT"}


class Collectives:
    """The collectives of one rank over the default process group.

    `transport` is where a tensor must be for the backend to carry it, `device` where results go that have no input of
    their own to follow.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, transport: torch.device) -> None:
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._transport = transport

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
        """See `World.barrier`. A gather whose result the host reads: it waits on every backend."""
        self._gather_values(encode(0), "barrier")

    def broadcast(self, x: torch.Tensor | Number | None, src: int) -> Any:
        """See `World.broadcast`."""
        if not 0 <= src < self._world_size:
            raise CollectiveError(f"src is {src}; it must be a rank, from 0 to {self._world_size - 1}")
        part = self._broadcast_part(encode(x) if self._rank == src else None, src)
        _raise_refused([part], "broadcast", first_rank=src)
        return decode(part, _device_of(x, self._device))

    def _reduce_tensor(self, x: torch.Tensor, op: Op) -> torch.Tensor:
        carrier, result = _dtypes(x, op)
        where = self._transport if self._world_size > 1 else x.device
        work = x.detach().to(where, carrier, copy=True, memory_format=torch.contiguous_format)
        if self._world_size > 1 and work.numel():
            flat = torch.view_as_real(work) if work.is_complex() else work
            dist.all_reduce(flat, op=getattr(dist.ReduceOp, _REDUCE[op]))
        if op == "mean":
            work = work.to(result) if not carrier.is_floating_point and not carrier.is_complex else work
            work /= self._world_size
        return work.to(x.device, result)

    def _gather_values(self, part: Part, name: str, device: torch.device | None = None) -> list[Any]:
        parts = self._gather_parts(part)
        _raise_refused(parts, name)
        return [decode(each, device or self._device) for each in parts]

    def _gather_parts(self, part: Part) -> list[Part]:
        if self._world_size == 1:
            return [part]
        own = torch.tensor(part.header(), dtype=torch.int64, device=self._transport)
        rows = [torch.empty_like(own) for _ in range(self._world_size)]
        dist.all_gather(rows, own)
        headers = torch.stack(rows).tolist()
        longest = max(payload_size(header) for header in headers)
        if longest == 0:
            return [from_header(header, part.payload) for header in headers]
        padded = torch.zeros(longest, dtype=torch.uint8, device=self._transport)
        padded[: part.payload.numel()] = part.payload.to(self._transport)
        payloads = [torch.empty_like(padded) for _ in range(self._world_size)]
        dist.all_gather(payloads, padded)
        return [from_header(header, payload) for header, payload in zip(headers, payloads, strict=True)]

    def _broadcast_part(self, part: Part | None, src: int) -> Part:
        if self._world_size == 1:
            assert part is not None
            return part
        header = [0] * HEADER_LENGTH if part is None else part.header()
        row = torch.tensor(header, dtype=torch.int64, device=self._transport)
        dist.broadcast(row, src)
        header = row.tolist()
        if part is None:
            payload = torch.empty(payload_size(header), dtype=torch.uint8, device=self._transport)
        else:
            payload = part.payload.to(self._transport)
        if payload.numel():
            dist.broadcast(payload, src)
        return from_header(header, payload)


def _device_of(x: object, otherwise: torch.device) -> torch.device:
    return x.device if isinstance(x, torch.Tensor) else otherwise


def _raise_refused(parts: list[Part], name: str, first_rank: int = 0) -> None:
    for rank, part in enumerate(parts, first_rank):
        if part.kind is Kind.REFUSED:
            raise CollectiveError(f"{name} on rank {rank} was given {refusal(part)}")


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
    if op == "mean":
        return torch.int64, torch.float32 if x.device.type == "mps" else torch.float64
    return torch.int64, x.dtype if op in ("min", "max") else torch.int64


T = TypeVar("T")


class Exchanging:
    """What ranks exchange. `waits` names the meetings where somebody watches."""

    def __init__(self, collectives: Collectives, waits: Waits | None) -> None:
        self._collectives = collectives
        self._meetings = waits
        self._closed = False

    @overload
    def all_reduce(self, x: torch.Tensor, op: Op = "sum") -> torch.Tensor: ...
    @overload
    def all_reduce(self, x: Number, op: Op = "sum") -> Any: ...
    def all_reduce(self, x: torch.Tensor | Number, op: Op = "sum") -> Any:
        """Reduce a tensor or number over all ranks; every rank gets the result.

        A number is reduced exactly: ints to an int of any size, floats in float64 with one rounding, ranks may mix the
        two, and `"mean"` is a float. A tensor must have the same shape and dtype on all ranks, any dtype and device;
        the result is a new tensor there. Integer and bool tensors add and multiply in int64 and stay int64, as in
        torch, wrapping beyond it; their `"mean"` is float64; 16-bit floats are added in float32 and rounded once.

        Args:
            x: a tensor, int, float or bool. An int on input is at most 64 bits.
            op: `"sum"`, `"mean"`, `"min"`, `"max"` or `"product"`.

        Raises:
            CollectiveError: an unknown op, or what no backend carries.
        """
        self._check_open("all_reduce")
        with self._waits("all_reduce"):
            return self._collectives.all_reduce(x, op)

    @overload
    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]: ...
    @overload
    def all_gather(self, x: Number) -> list[Any]: ...
    def all_gather(self, x: torch.Tensor | Number) -> list[Any]:
        """The tensors or numbers of all ranks, in rank order, on every rank.

        Shapes and dtypes may differ. Tensors come back bit for bit on the device of this rank's `x`.

        Raises:
            CollectiveError: a rank gave something else, on all ranks.
        """
        self._check_open("all_gather")
        with self._waits("all_gather"):
            return self._collectives.all_gather(x)

    @overload
    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor: ...
    @overload
    def broadcast(self, x: Number | None, src: int = 0) -> Any: ...
    def broadcast(self, x: torch.Tensor | Number | None, src: int = 0) -> Any:
        """The tensor or number of rank `src`, on every rank.

        The other ranks need not know its shape or dtype; what they give counts only for its device: the result is on
        the device of the tensor they gave, else on this rank's.

        Raises:
            CollectiveError: `src` is no rank, or its `x` is neither tensor nor number, on all ranks.
        """
        self._check_open("broadcast")
        with self._waits("broadcast"):
            return self._collectives.broadcast(x, src)

    def gather_objects(self, value: T) -> list[T]:
        """One object of each rank, in rank order, on every rank.

        Objects are pickled: keep them small, and put tensors in them on the CPU.

        Raises:
            CollectiveError: an object cannot be pickled, on all ranks.
        """
        self._check_open("gather_objects")
        with self._waits("gather_objects"):
            return self._collectives.gather_objects(value)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._check_open("barrier")
        with self._waits("barrier"):
            self._collectives.barrier()

    def _waits(self, name: str, depth: int = 1) -> AbstractContextManager[None]:
        """To be entered around what waits for the other ranks; `depth` frames lie between the caller and the user."""
        return nullcontext() if self._meetings is None else self._meetings.at(name, depth)

    def _check_open(self, name: str) -> None:
        if self._closed:
            raise WorldError(f"{name} was used on a World that is closed; call allstep.init() for a new one")


class Waits:
    """The meetings of one World, counted."""

    def __init__(self, pulse: RankActivity) -> None:
        self._pulse = pulse
        self._count = 0

    def at(self, name: str, depth: int) -> AbstractContextManager[None]:
        """Wait in `name` for the length of a with block; the user's line is `depth` frames above World's `_waits`."""
        self._count += 1
        user: FrameType | None = sys._getframe(2)
        for _ in range(depth):
            user = None if user is None else user.f_back
        where = "" if user is None else f" at {user.f_code.co_filename.rpartition('/')[2]}:{user.f_lineno}"
        return self._pulse.wait(f"{name} #{self._count}{where}")


Op = Literal["sum", "mean", "min", "max", "product"]
Number = bool | int | float


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
