"""PyTorch-Ignite's engine with allstep's loop: change the import of `ignite.engine` to this package, and nothing else.

What lives here: `Engine`, which is an instance of Ignite's own class and of allstep's; the state that both know; and
Ignite's factories, which make such engines. All other names are Ignite's own, so that `ignite.handlers`,
`ignite.metrics` and `ignite.distributed` work with them as they are. Where a script could tell, this follows Ignite,
except that nothing hangs, repeats or is lost. What does not live here: allstep's own answers, which are those of
`allstep.Engine`. Nothing below knows of this package, and `pytorch-ignite` is needed by it alone.

The names of what `ignite.engine` has are all here, so that one line of a script changes. Those that it does not make
public, such as the `_prepare_batch` that scripts import, are looked up in it when they are asked for.
"""

from typing import TYPE_CHECKING, Any

try:
    import ignite as _installed
except ImportError as error:  # pragma: no cover - every test environment has it
    raise ImportError("allstep.ignite needs PyTorch-Ignite: pip install 'allstep[ignite]'") from error

# Ignite's own, each under its name, which tells type checkers that it is meant to be imported from here.
from ignite.engine import CallableEventWithFilter as CallableEventWithFilter
from ignite.engine import EventEnum as EventEnum
from ignite.engine import Events as Events
from ignite.engine import EventsList as EventsList
from ignite.engine import RemovableEventHandle as RemovableEventHandle
from ignite.engine import supervised_evaluation_step as supervised_evaluation_step
from ignite.engine import supervised_evaluation_step_amp as supervised_evaluation_step_amp
from ignite.engine import supervised_training_step as supervised_training_step
from ignite.engine import supervised_training_step_amp as supervised_training_step_amp
from ignite.engine import supervised_training_step_apex as supervised_training_step_apex
from ignite.engine import supervised_training_step_tpu as supervised_training_step_tpu
from ignite.engine.deterministic import ReproducibleBatchSampler as ReproducibleBatchSampler
from ignite.engine.deterministic import keep_random_state as keep_random_state
from ignite.engine.deterministic import update_dataloader as update_dataloader

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
    "State",
    "create_supervised_evaluator",
    "create_supervised_trainer",
    "supervised_evaluation_step",
    "supervised_evaluation_step_amp",
    "supervised_training_step",
    "supervised_training_step_amp",
    "supervised_training_step_apex",
    "supervised_training_step_tpu",
]

if not TYPE_CHECKING:  # a type checker is to refuse a name that is misspelt

    def __getattr__(name: str) -> Any:
        import ignite.engine

        try:
            return getattr(ignite.engine, name)
        except AttributeError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
