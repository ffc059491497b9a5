"""What the packages above need from a World besides what a script uses: the one door for them.

Contract: `allstep.world.internals(world)` gives the record. The engine asks its coordinator how to agree, tells its
activity where the loop is, and tells its reporter what a run raised. Checkpoints ask which modules are wrapped. No
caller replaces a field. The record holds as long as the World is open.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import nn

from allstep.coordination import Coordinator
from allstep.protocol.heartbeat import RankActivity
from allstep.world.failures import Reporter


@dataclass(slots=True)
class WorldInternals:
    """The inner parts of one World.

    Attributes:
        coordinator: how the engines of this world agree.
        activity: where this rank is; the monitoring service is told from it.
        reporter: tells exceptions to that service; None where no service watches over the ranks.
    """

    coordinator: Coordinator
    activity: RankActivity
    reporter: Reporter | None
    _wrapped: list[weakref.ref[nn.Module]] = field(default_factory=list)

    def add_wrapped(self, module: nn.Module) -> None:
        """Take note of a module that `World.wrap` gave; it is not kept alive by this."""
        self._wrapped.append(weakref.ref(module))

    def wrapped_modules(self) -> list[nn.Module]:
        """What `World.wrap` gave, in order, as far as it is still in use."""
        return [module for reference in self._wrapped if (module := reference()) is not None]
