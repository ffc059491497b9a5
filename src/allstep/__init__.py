"""allstep: train a PyTorch model on every device a job has, with every rank taking the same step.

Names are imported when first used (PEP 562), so that `import allstep` costs no torch import: the launcher's parent
process, which never touches a tensor, stays small and starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from allstep.version import __version__

if TYPE_CHECKING:
    from allstep.checkpoint import Checkpoint
    from allstep.coordination import Alone, Coordinator
    from allstep.data import Permutation, ShardedBatchSampler, shard
    from allstep.engine import Engine, EventEnum, Events, State, create_supervised_evaluator, create_supervised_trainer
    from allstep.errors import AllstepError
    from allstep.handlers import EarlyStopping, Preemption, StopOnSignal, TerminateOnNan, TimeLimit
    from allstep.metrics import Max, Mean, Metrics, Min, Sum, Usage
    from allstep.outputs import Gather
    from allstep.placement import Placement
    from allstep.world import World, init

_HOMES = {
    "Alone": "allstep.coordination",
    "AllstepError": "allstep.errors",
    "Checkpoint": "allstep.checkpoint",
    "Coordinator": "allstep.coordination",
    "EarlyStopping": "allstep.handlers",
    "Engine": "allstep.engine",
    "EventEnum": "allstep.engine",
    "Events": "allstep.engine",
    "Gather": "allstep.outputs",
    "Max": "allstep.metrics",
    "Mean": "allstep.metrics",
    "Metrics": "allstep.metrics",
    "Min": "allstep.metrics",
    "Permutation": "allstep.data",
    "Placement": "allstep.placement",
    "Preemption": "allstep.handlers",
    "ShardedBatchSampler": "allstep.data",
    "State": "allstep.engine",
    "StopOnSignal": "allstep.handlers",
    "Sum": "allstep.metrics",
    "TerminateOnNan": "allstep.handlers",
    "TimeLimit": "allstep.handlers",
    "Usage": "allstep.metrics",
    "World": "allstep.world",
    "create_supervised_evaluator": "allstep.engine",
    "create_supervised_trainer": "allstep.engine",
    "init": "allstep.world",
    "shard": "allstep.data",
}

__all__ = [
    "AllstepError",
    "Alone",
    "Checkpoint",
    "Coordinator",
    "EarlyStopping",
    "Engine",
    "EventEnum",
    "Events",
    "Gather",
    "Max",
    "Mean",
    "Metrics",
    "Min",
    "Permutation",
    "Placement",
    "Preemption",
    "ShardedBatchSampler",
    "State",
    "StopOnSignal",
    "Sum",
    "TerminateOnNan",
    "TimeLimit",
    "Usage",
    "World",
    "__version__",
    "create_supervised_evaluator",
    "create_supervised_trainer",
    "init",
    "shard",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
