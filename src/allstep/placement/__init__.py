"""Which rank this process is: pure functions from an environment mapping to a frozen `Placement`. Imports no torch.

`detect` asks one file after another: `torchrun` (and `allstep run`), `by_hand`, `xla`, `mpi`, `slurm`, `kubernetes`,
`batch_systems`. Each answers from environment variables alone, read by `variables`. Nothing here connects, chooses a
device or sets a variable: meeting the other ranks is `allstep.world`'s, and setting the variables `allstep.launch`'s.
`mesh` says which ranks share a model or a batch.
"""

from allstep.placement.detect import detect
from allstep.placement.mesh import DataRanks, MeshShape, check_nodes, parse_mesh, resolve_mesh
from allstep.placement.placement import Launcher, Placement, Rendezvous

__all__ = [
    "DataRanks",
    "Launcher",
    "MeshShape",
    "Placement",
    "Rendezvous",
    "check_nodes",
    "detect",
    "parse_mesh",
    "resolve_mesh",
]
