"""Ranks that are threads: agreement at breadth, without processes.

Contract: `simulate` calls a function in one thread per rank with a coordinator that meets the others in memory, call by
call in order, as a process group would. It runs the very engine and ledger that real ranks run; what it does not run is
torch.distributed. When a rank raises, the others' next meeting raises too, so that nothing hangs. What can go wrong:
ranks that wait for each other for longer than `timeout` seconds, which raises in all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from allstep.coordination import ReduceOp
from allstep.errors import SimulationError

T = TypeVar("T")


@dataclass(slots=True)
class _Meetings:
    world_size: int
    timeout: float
    changed: threading.Condition = field(default_factory=threading.Condition)
    values: dict[int, dict[int, Any]] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)
    broken: str | None = None

    def bring(self, number: int, rank: int, value: Any) -> None:
        with self.changed:
            self.values.setdefault(number, {})[rank] = value
            self.changed.notify_all()

    def result(self, number: int) -> list[Any]:
        with self.changed:
            came = self.values.setdefault(number, {})
            in_time = self.changed.wait_for(lambda: len(came) == self.world_size or self.broken, self.timeout)
            if len(came) < self.world_size:
                missing = sorted(set(range(self.world_size)) - set(came))
                self.broken = self.broken or f"ranks {missing} did not come to meeting {number}"
                self.changed.notify_all()
                raise SimulationError(self.broken if in_time else f"{self.broken} within {self.timeout} s")
            self.left[number] = self.left.get(number, 0) + 1
            if self.left[number] == self.world_size:
                del self.values[number]
            return [came[rank] for rank in range(self.world_size)]

    def break_off(self, why: str) -> None:
        with self.changed:
            self.broken = self.broken or why
            self.changed.notify_all()


@dataclass(frozen=True, slots=True)
class _Vote:
    meetings: _Meetings
    number: int

    def wait(self) -> list[int]:
        return [sum(column) for column in zip(*self.meetings.result(self.number), strict=True)]


class SimulatedRank:
    """The coordinator of one simulated rank. `calls` counts the meetings it came to."""

    def __init__(self, meetings: _Meetings, rank: int) -> None:
        self._meetings = meetings
        self.rank = rank
        self.world_size = meetings.world_size
        self.calls = 0

    def vote(self, vector: Sequence[int]) -> _Vote:
        """Bring the vector; the sum is read later."""
        return _Vote(self._meetings, self._bring(list(vector)))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value."""
        return self._meetings.result(self._bring(value))

    def gather_bytes(self, buffer: torch.Tensor) -> torch.Tensor:
        """Every rank's bytes. Sizes that differ, which abort a process group, raise here."""
        rows = self._meetings.result(self._bring(buffer))
        if len({row.shape for row in rows}) > 1:
            raise SimulationError(f"ranks brought buffers of different sizes: {[row.numel() for row in rows]}")
        return torch.stack(rows)

    def reduce_tensor(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Reduced in rank order."""
        stacked = torch.stack(self._meetings.result(self._bring(tensor)))
        return stacked.sum(0) if op == "sum" else stacked.amax(0) if op == "max" else stacked.amin(0)

    def broadcast(self, value: Any, source: int) -> Any:
        """The value of rank `source`."""
        return self.gather(value)[source]

    def _bring(self, value: Any) -> int:
        self.calls += 1
        self._meetings.bring(self.calls, self.rank, value)
        return self.calls


def simulate(fn: Callable[..., T], world_size: int, *args: Any, timeout: float = 20.0) -> list[T]:
    """Call `fn(coordinator, *args)` on `world_size` simulated ranks; give back what each returned, in rank order.

    Args:
        fn: any function; give its engines `coordinator=coordinator`.
        world_size: number of ranks.
        args: further arguments, shared by the ranks.
        timeout: seconds that ranks wait for each other in a meeting.

    Raises:
        Exception: what the lowest rank raised that did not merely notice another's end.
        SimulationError: ranks waited for each other in vain.
    """
    meetings = _Meetings(world_size, timeout)
    results: list[Any] = [None] * world_size
    errors: dict[int, BaseException] = {}

    def call(rank: int) -> None:
        try:
            results[rank] = fn(SimulatedRank(meetings, rank), *args)
        except BaseException as error:
            errors[rank] = error
            meetings.break_off(f"rank {rank} raised {error!r}")

    threads = [threading.Thread(target=call, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        own = {rank: error for rank, error in errors.items() if not isinstance(error, SimulationError)}
        raise (own or errors)[min(own or errors)]
    return results
