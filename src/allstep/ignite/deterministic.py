"""..."""
from allstep.ignite.ignite_engine import IgniteEngine as DeterministicEngine
