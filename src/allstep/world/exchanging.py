"""The doors of World to its collectives: open or an error, and named while this rank waits in one.

Contract: `World` builds on this. Every rank calls the same method at the same point; what crosses is `collectives`'.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, overload

import torch

from allstep.errors import WorldError
from allstep.world.collectives import Collectives
from allstep.world.folding import Number, Op
from allstep.world.waiting import Waits

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
