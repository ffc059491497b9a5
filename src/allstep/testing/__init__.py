"""Real ranks inside a test: what allstep's own tests use, public so that users test their scripts with it."""

from allstep.testing.ranks import RanksError, run_ranks

__all__ = ["RanksError", "run_ranks"]
