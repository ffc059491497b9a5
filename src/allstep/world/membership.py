"""`Membership`: whether a World can be used, its waits for the other ranks, and how this rank leaves it.

Contract: one for each World, made with it. It is open until `leave`, by the script, by an exception, where the
interpreter ends, or until `end_in_child` in a process that was forked from the rank. Then `check_open` raises and says
why. Leaving in order: what has to be finished first is finished, the monitoring service is told, and the process group
is left. In this order, because taking down a group may wait for ranks that are gone, which is no failure of this one.
Leaving after an exception waits for nobody.
"""

from __future__ import annotations

import atexit
import sys
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from allstep.errors import WorldError
from allstep.faults import RankPosition, strike
from allstep.placement import Placement
from allstep.world import current, early_signals
from allstep.world.collectives import NamedWaits
from allstep.world.internals import WorldInternals
from allstep.world.lifetime import NoCoordinator, inherited_from, keep_for_ever
from allstep.world.process_group import Group

_AT_EXIT_S = 5.0  # an interpreter that ends with its World open does not wait longer than this for the other ranks


class Membership:
    """One rank's time in a World.

    Args:
        world: which; it is not kept alive by this.
        placement: where this process is.
        group: the process group that is left; None in a world of one.
        internals: what is finished before, and who is told.
        timeout: seconds that ranks wait for each other.

    Attributes:
        closed: why the World can no longer be used; empty while it can.
    """

    def __init__(
        self, world: object, placement: Placement, group: Group | None, internals: WorldInternals, timeout: float
    ) -> None:
        self.closed = ""
        self._world: weakref.ref[Any] = weakref.ref(world)
        self._placement = placement
        self._group = group
        self._internals = internals
        self._timeout = timeout
        # Waits are named for the monitoring service; without one the search for the calling line is spared.
        has_listener = group is not None and internals.reporter is not None
        self._named_waits = NamedWaits(internals.activity) if has_listener else None

    def check_open(self, name: str) -> None:
        """Raise WorldError unless the World can be used; `name` is what for."""
        if self.closed:
            raise WorldError(f"{name} was used on a World that {self.closed}")

    def waits(self, name: str) -> AbstractContextManager[None]:
        """To be entered around what waits for the other ranks."""
        return nullcontext() if self._named_waits is None else self._named_waits.at(name)

    def collective(self, name: str) -> AbstractContextManager[None]:
        """To be entered around a collective of this name."""
        self.check_open(name)
        return self.waits(name)

    def leave(self, *, failed: bool, patience: float | None = None, in_order: bool = True) -> None:
        """Leave the World; a second time does nothing.

        Args:
            failed: an exception ends it: wait for nobody.
            patience: seconds to wait for the other ranks otherwise; by default the World's own limit.
            in_order: the script has closed it.
        """
        if self.closed:
            return
        # First of all, so that whatever fails below, a next call of `init` can open another World.
        self.closed = "is closed; call allstep.init() for a new one"
        current.remove(self._world())
        atexit.unregister(self.end_at_exit)
        reporter = self._internals.reporter
        try:
            raised = self._internals.finish(failed=failed)
            if not in_order and reporter is not None:
                reporter.left_open()
            strike(RankPosition("exit", self._placement.rank, self._placement.attempt))
            if self._group is not None:
                if reporter is not None and not failed:
                    reporter.say_goodbye()
                with self.waits("close"):
                    self._group.leave(failed=failed, patience=self._timeout if patience is None else patience)
            if reporter is not None:
                reporter.end(failed=failed)
        finally:
            early_signals.restore_default_action()
        if raised is not None:
            raise raised

    def end_at_exit(self) -> None:
        """The interpreter ends, and the World is open."""
        printed = getattr(sys, "last_value", None) is not None  # an uncaught exception, by the interpreter
        self.leave(failed=printed, patience=min(self._timeout, _AT_EXIT_S), in_order=False)

    def end_in_child(self) -> None:
        """This process was forked from the rank, whose World is none of its business."""
        if not self.closed:
            rank, world_size = self._placement.rank, self._placement.world_size
            self.closed = why = inherited_from(rank)
            self._internals.coordinator, self._internals.reporter = NoCoordinator(rank, world_size, why), None
            keep_for_ever([] if self._group is None else self._group.parts())
