"""Ignite's supervised trainers and evaluators, as engines of this package.

Contract: steps, options and checks are Ignite's own: its factory is called, and the step that it made is given to an
engine of allstep's, with what it put into the state, such as a gradient scaler. Over ranks an evaluation reads what
every rank has: one whose data ends before the others' skips the step meanwhile. Its metrics are told of nothing, and
handlers that look at an output are not called.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from ignite.engine import DeterministicEngine as OriginalDeterministicEngine
from ignite.engine import create_supervised_evaluator as make_evaluator
from ignite.engine import create_supervised_trainer as make_trainer

from allstep.ignite.deterministic import DeterministicEngine
from allstep.ignite.ignite_engine import IgniteEngine
from allstep.ignite.ignite_private import step_of


@wraps(make_trainer)
def create_supervised_trainer(*args: Any, **kwargs: Any) -> IgniteEngine:
    """A trainer; arguments and checks are those of Ignite's function of this name."""
    made = make_trainer(*args, **kwargs)
    is_deterministic = isinstance(made, OriginalDeterministicEngine)
    trainer = (DeterministicEngine if is_deterministic else IgniteEngine)(step_of(made))
    for name, value in vars(made.state).items():
        if not hasattr(trainer.state, name):
            setattr(trainer.state, name, value)
    return trainer


@wraps(make_evaluator)
def create_supervised_evaluator(model: Any, metrics: Any = None, *args: Any, **kwargs: Any) -> IgniteEngine:
    """An evaluator with metrics attached; arguments and checks are those of Ignite's function of this name."""
    made = make_evaluator(model, None, *args, **kwargs)
    evaluator = IgniteEngine(step_of(made), uneven="longest", idle="skip", resumes=False)
    for name, metric in (metrics or {}).items():
        metric.attach(evaluator, name)
    return evaluator
