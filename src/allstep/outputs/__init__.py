"""What the steps of all ranks returned, sample by sample, in the order of the samples.

`Gather` attaches to an engine and gives all ranks' outputs in memory; `Parts` are the files that each rank writes where
that is too much. Metrics over the same outputs are in `allstep.metrics`, and what is saved to go on from in
`allstep.checkpoint`.
"""

from allstep.outputs.gather import Gather
from allstep.outputs.parts import Parts

__all__ = ["Gather", "Parts"]
