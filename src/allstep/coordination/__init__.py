"""How ranks agree: the `Coordinator` protocol and `Alone`, its meaning in a world of one."""

from allstep.coordination.alone import Alone
from allstep.coordination.coordinator import Coordinator, Request

__all__ = ["Alone", "Coordinator", "Request"]
