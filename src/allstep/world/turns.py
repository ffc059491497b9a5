"""`Turns`: the main rank first, then the others, for work that is to be done once.

Contract: every rank enters the same turns in the same order. The others wait at the store until the first rank has left
its body, also by an exception. In a world of one nobody waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from allstep.placement import Placement
from allstep.protocol.heartbeat import RankActivity
from allstep.world.bounded_store import first_then_rest
from allstep.world.process_group import Group


class Turns:
    """Counts the turns of one rank."""

    def __init__(self, placement: Placement, group: Group | None, activity: RankActivity) -> None:
        self._placement = placement
        self._group = group
        self._activity = activity
        self._count = 0

    @contextmanager
    def take(self, *, local: bool, timeout: float, waits: AbstractContextManager[None]) -> Iterator[None]:
        """Run the body on the first rank of all, or of this node, then on the others.

        Args:
            local: the first is local rank 0 of each node.
            timeout: seconds that the others wait.
            waits: entered by the others while they wait.

        Raises:
            WorldError: the first rank did not finish in time or is gone, on the others.
        """
        # A key is never used twice, so each call has a number; it is the same on ranks that act alike.
        self._count += 1
        if self._group is None:
            yield
            return
        placement = self._placement
        key = f"main_first/{self._count}/{placement.node_rank if local else 'all'}"
        first = (placement.local_rank if local else placement.rank) == 0
        turn = first_then_rest(
            self._group.rendezvous.store, key, first=first, timeout=timeout, waits=nullcontext() if first else waits
        )
        # "idle" has no limit of its own: how long this may take is what `timeout` says.
        with self._activity.section("idle"), turn:
            yield
