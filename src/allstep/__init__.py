"""allstep: train a PyTorch model on every device a job has, with every rank taking the same step.

What a training script uses is here. Names for other purposes live in their packages, such as
`allstep.coordination.Coordinator` and `allstep.data.ShardedBatchSampler`.

Names are imported when they are first used (PEP 562), so that `import allstep` does not import torch. The process of
`allstep run`, which never touches a tensor, stays small and starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from allstep.version import __version__ as __version__

if TYPE_CHECKING:
    # For type checkers and editors, which do not run `__getattr__`. A test holds it equal to the table below.
    from allstep.checkpoint import Checkpoint as Checkpoint
    from allstep.coordination import Alone as Alone
    from allstep.data import shard as shard
    from allstep.engine import Engine as Engine
    from allstep.engine import Events as Events
    from allstep.engine import State as State
    from allstep.errors import AllstepError as AllstepError
    from allstep.handlers import EMA as EMA
    from allstep.handlers import SWA as SWA
    from allstep.handlers import BatchSizeFinder as BatchSizeFinder
    from allstep.handlers import EarlyStopping as EarlyStopping
    from allstep.handlers import Evaluate as Evaluate
    from allstep.handlers import Freeze as Freeze
    from allstep.handlers import GradientClipping as GradientClipping
    from allstep.handlers import LRFinder as LRFinder
    from allstep.handlers import Preemption as Preemption
    from allstep.handlers import ProgressBar as ProgressBar
    from allstep.handlers import SaveBest as SaveBest
    from allstep.handlers import Schedule as Schedule
    from allstep.handlers import StopOnSignal as StopOnSignal
    from allstep.handlers import TerminateOnNan as TerminateOnNan
    from allstep.handlers import Throughput as Throughput
    from allstep.handlers import TimeLimit as TimeLimit
    from allstep.metrics import Max as Max
    from allstep.metrics import Mean as Mean
    from allstep.metrics import Metrics as Metrics
    from allstep.metrics import Min as Min
    from allstep.metrics import Sum as Sum
    from allstep.outputs import Gather as Gather
    from allstep.tracking import Track as Track
    from allstep.trainers import create_supervised_evaluator as create_supervised_evaluator
    from allstep.trainers import create_supervised_trainer as create_supervised_trainer
    from allstep.world import World as World
    from allstep.world import init as init

_HOMES = {
    "AllstepError": "allstep.errors",
    "Alone": "allstep.coordination",
    "BatchSizeFinder": "allstep.handlers",
    "Checkpoint": "allstep.checkpoint",
    "EMA": "allstep.handlers",
    "EarlyStopping": "allstep.handlers",
    "Engine": "allstep.engine",
    "Evaluate": "allstep.handlers",
    "Events": "allstep.engine",
    "Freeze": "allstep.handlers",
    "Gather": "allstep.outputs",
    "GradientClipping": "allstep.handlers",
    "LRFinder": "allstep.handlers",
    "Max": "allstep.metrics",
    "Mean": "allstep.metrics",
    "Metrics": "allstep.metrics",
    "Min": "allstep.metrics",
    "Preemption": "allstep.handlers",
    "ProgressBar": "allstep.handlers",
    "SWA": "allstep.handlers",
    "SaveBest": "allstep.handlers",
    "Schedule": "allstep.handlers",
    "State": "allstep.engine",
    "StopOnSignal": "allstep.handlers",
    "Sum": "allstep.metrics",
    "TerminateOnNan": "allstep.handlers",
    "Throughput": "allstep.handlers",
    "TimeLimit": "allstep.handlers",
    "Track": "allstep.tracking",
    "World": "allstep.world",
    "create_supervised_evaluator": "allstep.trainers",
    "create_supervised_trainer": "allstep.trainers",
    "init": "allstep.world",
    "shard": "allstep.data",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
