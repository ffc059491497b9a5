"""Ranks that are threads: agreement over many ranks without processes.

Contract: `simulate` calls a function in one thread per rank, with a coordinator whose collectives go through memory.
The ranks' first collectives belong together, then their second ones, and so on, as in a process group. It runs the very
engine and ledger that real ranks run. What it does not run is torch.distributed.

What can go wrong: when a rank raises, the others' next collective raises too, so that nothing hangs. Ranks that wait
for each other for longer than `timeout` seconds all raise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from allstep.coordination import ReduceOp
from allstep.errors import ArgumentError, SimulationError
from allstep.placement import DataRanks

T = TypeVar("T")


@dataclass(slots=True)
class _ThreadGroup:
    """What ranks have contributed to each collective, by its number, and how many ranks have read the result."""

    world_size: int
    timeout: float
    sharing: int = 1
    changed: threading.Condition = field(default_factory=threading.Condition)
    contributions: dict[int, dict[int, Any]] = field(default_factory=dict)
    readers: dict[int, int] = field(default_factory=dict)
    aborted: str | None = None

    def contribute(self, number: int, rank: int, value: Any) -> None:
        """Give a rank's value; nobody waits here, as in an asynchronous collective."""
        with self.changed:
            self.contributions.setdefault(number, {})[rank] = value
            self.changed.notify_all()

    def result(self, number: int) -> list[Any]:
        """Wait for every rank's value and return them in rank order."""
        with self.changed:
            values = self.contributions.setdefault(number, {})
            in_time = self.changed.wait_for(lambda: len(values) == self.world_size or self.aborted, self.timeout)
            if len(values) < self.world_size:
                missing = sorted(set(range(self.world_size)) - set(values))
                self.aborted = self.aborted or f"ranks {missing} did not come to collective {number}"
                self.changed.notify_all()
                raise SimulationError(self.aborted if in_time else f"{self.aborted} within {self.timeout} s")
            self.readers[number] = self.readers.get(number, 0) + 1
            if self.readers[number] == self.world_size:  # nobody reads it again, and runs are long
                del self.contributions[number], self.readers[number]
            return [values[rank] for rank in range(self.world_size)]

    def abort(self, why: str) -> None:
        """Have every rank that waits, or will, raise."""
        with self.changed:
            self.aborted = self.aborted or why
            self.changed.notify_all()


@dataclass(frozen=True, slots=True)
class _SimulatedSum:
    """A vote that was cast and not read yet."""

    group: _ThreadGroup
    number: int

    def wait(self) -> list[int]:
        return [sum(column) for column in zip(*self.group.result(self.number), strict=True)]


class SimulatedRank:
    """The coordinator of one simulated rank. `calls` counts the collectives it took part in."""

    def __init__(self, group: _ThreadGroup, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.world_size = group.world_size
        self.data = DataRanks.of(rank, group.world_size, group.sharing)
        self.calls = 0

    def vote(self, vector: Sequence[int]) -> _SimulatedSum:
        """Contribute the vector; the sum is read later."""
        return _SimulatedSum(self._group, self._contribute(list(vector)))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value."""
        return self._group.result(self._contribute(value))

    def gather_bytes(self, buffer: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Every rank's bytes. Sizes that differ, which abort a process group, raise here."""
        # A copy: this rank may write to its buffer again before the others have read it.
        found = self._group.result(self._contribute(buffer.clone()))
        if len({row.shape for row in found}) > 1:
            raise SimulationError(f"ranks gave buffers of different sizes: {[row.numel() for row in found]}")
        return torch.stack(found, out=rows)

    def reduce_tensor(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Reduced in rank order."""
        stacked = torch.stack(self._group.result(self._contribute(tensor)))
        return stacked.sum(0) if op == "sum" else stacked.amax(0) if op == "max" else stacked.amin(0)

    def broadcast(self, value: Any, source: int) -> Any:
        """The value of rank `source`."""
        return self.gather(value)[source]

    def _contribute(self, value: Any) -> int:
        self.calls += 1
        self._group.contribute(self.calls, self.rank, value)
        return self.calls


def simulate(fn: Callable[..., T], world_size: int, *args: Any, timeout: float = 20.0, sharing: int = 1) -> list[T]:
    """Call `fn(coordinator, *args)` on `world_size` simulated ranks; give back what each returned, in rank order.

    Args:
        fn: any function; give its engines `coordinator=coordinator`.
        world_size: number of ranks.
        args: further arguments, shared by the ranks.
        timeout: seconds that ranks wait for each other in a collective.
        sharing: neighbours that are given the same batches, as the ranks of a tensor-parallel group are.

    Raises:
        ArgumentError: `world_size` is less than 1.
        Exception: what the lowest rank raised that did not merely notice another's end.
        SimulationError: ranks waited for each other in vain.
    """
    if world_size < 1:
        raise ArgumentError(f"world_size is {world_size}; it must be 1 or more")
    group = _ThreadGroup(world_size, timeout, sharing)
    results: list[Any] = [None] * world_size
    errors: dict[int, BaseException] = {}

    def call(rank: int) -> None:
        try:
            results[rank] = fn(SimulatedRank(group, rank), *args)
        except BaseException as error:
            errors[rank] = error
            group.abort(f"rank {rank} raised {error!r}")

    threads = [threading.Thread(target=call, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        own = {rank: error for rank, error in errors.items() if not isinstance(error, SimulationError)}
        raise (own or errors)[min(own or errors)]
    return results
