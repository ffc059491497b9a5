"""World and init: devices, process groups, and the doors to parallel and data."""

from allstep.world.initialization import init
from allstep.world.move import to_device
from allstep.world.world import World

__all__ = ["World", "init", "to_device"]
