"""Collectives for tensors and numbers, with a meaning in a world of one.

Contract: every rank calls the same method at the same point. Inputs are left as they are, results are new. Nothing
passes through a type that could round it: numbers and gathered tensors travel as their own bits. `all_gather`,
`broadcast`, `gather_objects` and all collectives of numbers first exchange what each rank has, so shapes may differ,
and what one rank cannot send raises the same CollectiveError on all. `all_reduce` of a tensor is one collective with
nothing before it: shapes and dtypes must be the same on all ranks. With one rank no process group is used.
"""

from __future__ import annotations

from typing import Any, cast, get_args

import torch
import torch.distributed as dist

from allstep.errors import CollectiveError
from allstep.world.folding import Number, Op, fold
from allstep.world.parts import (
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
