"""Ready engines for the usual kinds of training, so that a script does not write the step itself.

What lives here: functions that make an `Engine` around a model, an optimizer and a loss. What does not: the loop that
runs the step (`engine`), and what is attached to an engine (`handlers`, `metrics`, `checkpoint`).
"""

from allstep.trainers.supervised import create_supervised_evaluator, create_supervised_trainer

__all__ = ["create_supervised_evaluator", "create_supervised_trainer"]
