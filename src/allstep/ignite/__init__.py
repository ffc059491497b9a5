"""PyTorch-Ignite's engine with allstep's loop: change the import of `ignite.engine` to this package, and nothing else.

What lives here: `Engine`, which is an instance of Ignite's own class and of allstep's; the state that both know; and
Ignite's factories, which make such engines. All other names are Ignite's own, so that `ignite.handlers`,
`ignite.metrics` and `ignite.distributed` work with them as they are. Where a script could tell, this follows Ignite,
except that nothing hangs, repeats or is lost. What does not live here: allstep's own answers, which are those of
`allstep.Engine`. Nothing below knows of this package, and `pytorch-ignite` is needed by it alone.

The names of what `ignite.engine` has are all here, so that one line of a script changes.
"""

try:
    import ignite as _installed
except ImportError as error:  # pragma: no cover - every test environment has it
    raise ImportError("allstep.ignite needs PyTorch-Ignite: pip install 'allstep[ignite]'") from error

from ignite.engine import (
    CallableEventWithFilter,
    EventEnum,
    Events,
    EventsList,
    RemovableEventHandle,
    supervised_evaluation_step,
    supervised_evaluation_step_amp,
    supervised_training_step,
    supervised_training_step_amp,
    supervised_training_step_apex,
    supervised_training_step_tpu,
)
from ignite.engine.deterministic import ReproducibleBatchSampler, keep_random_state, update_dataloader

from allstep.ignite.deterministic import DeterministicEngine
from allstep.ignite.factories import create_supervised_evaluator, create_supervised_trainer
from allstep.ignite.ignite_engine import IgniteEngine as Engine
from allstep.ignite.ignite_state import IgniteState as State

del _installed

__all__ = [
    "CallableEventWithFilter",
    "DeterministicEngine",
    "Engine",
    "EventEnum",
    "Events",
    "EventsList",
    "RemovableEventHandle",
    "ReproducibleBatchSampler",
    "State",
    "create_supervised_evaluator",
    "create_supervised_trainer",
    "keep_random_state",
    "supervised_evaluation_step",
    "supervised_evaluation_step_amp",
    "supervised_training_step",
    "supervised_training_step_amp",
    "supervised_training_step_apex",
    "supervised_training_step_tpu",
    "update_dataloader",
]
