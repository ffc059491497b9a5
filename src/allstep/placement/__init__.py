"""Which rank this process is: pure functions from an environment mapping to a frozen `Placement`. Imports no torch.

`detect` asks one file after another: `torchrun` (and `allstep run`), `by_hand`, `xla`, `mpi`, `slurm`. Each answers
from environment variables alone, read by `variables`. Nothing here connects, chooses a device or sets a variable:
meeting the other ranks is `allstep.world`'s, and setting the variables `allstep.launch`'s.
"""

from allstep.placement.detect import detect
from allstep.placement.placement import Launcher, Placement, Rendezvous

__all__ = ["Launcher", "Placement", "Rendezvous", "detect"]
