"""For how long a World is current: until it is closed, or the interpreter ends; in a forked child it is over.

Contract: `make_current` is called once for each World, by `init`. A process that is forked from a rank is no rank. In
it the World can still say which rank it was, which a dataset in a loader's worker asks. But it crosses no ranks, and
its end does nothing: the sockets, the store and the monitoring service are the rank's. Torch's groups and the store's
server have threads which a child lacks, so their destructors would wait or crash: the child keeps them to its end.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from allstep.errors import WorldError
from allstep.placement import DataRanks
from allstep.world import current


class Member(Protocol):
    """What a World is to this module, by its `_membership`."""

    def end_at_exit(self) -> None:
        """The interpreter ends, and the World is open."""

    def end_in_child(self) -> None:
        """This process was forked from the rank."""


def make_current(world: Any) -> None:
    """Make a World the current one, and have it ended with the interpreter, or in a forked child, if it is open."""
    member: Member = world._membership
    current.install(world)
    atexit.register(member.end_at_exit)
    # What is registered stays registered for the life of the process, which may see many Worlds.
    ended: Callable[[], Callable[[], None] | None] = weakref.WeakMethod(member.end_in_child)
    os.register_at_fork(after_in_child=lambda: _call(ended()))


def keep_for_ever(values: Iterable[object]) -> None:
    """Have no destructor run of these objects: with one reference too many they last as long as the process."""
    for value in values:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def inherited_from(rank: int) -> str:
    """Why a World cannot be used in a process that was forked from a rank."""
    return (
        f"belongs to rank {rank}, from which this process was forked. Have the child call nothing that crosses ranks, "
        "or start it by multiprocessing's spawn"
    )


class NoCoordinator:
    """Stands for a rank's coordinator in a process that was forked from it: it says who asked, and raises."""

    def __init__(self, rank: int, world_size: int, why: str) -> None:
        self.rank = rank
        self.world_size = world_size
        self.data = DataRanks.of(rank, world_size)
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise WorldError(f"an engine or a metric was to cross ranks in a World that {self._why}")


def _call(function: Callable[[], None] | None) -> None:
    if function is not None:
        function()
