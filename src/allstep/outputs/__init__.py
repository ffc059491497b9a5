"""What the steps of all ranks returned, sample by sample, in the order of the samples: gathered, or written to
files."""

from allstep.outputs.gather import Gather
from allstep.outputs.parts import Parts

__all__ = ["Gather", "Parts"]
