"""The world of a script: `init` opens it, and `World` is this process' rank, device and collectives.

Here live the choice of device and backend, the rendezvous of the ranks, the default process group, the collectives of
tensors, numbers and objects, the facts that all ranks must share, the reports of a rank's exceptions, and seeding.

What does not live here: how a model is wrapped (`parallel`), who reads which sample (`data`), how engines vote
(`coordination`), and the service that watches over the ranks (`monitor`). Packages above reach the inner parts of a
World through `internals` only.
"""

from allstep.world.device_mesh import current_data_ranks
from allstep.world.initialization import init
from allstep.world.internals import WorldInternals
from allstep.world.move import to_device
from allstep.world.numbers import to_numbers
from allstep.world.plan_training import plan_training
from allstep.world.world import World, internals

__all__ = [
    "World",
    "WorldInternals",
    "current_data_ranks",
    "init",
    "internals",
    "plan_training",
    "to_device",
    "to_numbers",
]
