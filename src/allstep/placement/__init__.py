"""Who am I: pure functions from an environment mapping to a frozen `Placement`. Imports no torch."""

from allstep.placement.detect import detect
from allstep.placement.placement import Launcher, Placement, Rendezvous

__all__ = ["Launcher", "Placement", "Rendezvous", "detect"]
