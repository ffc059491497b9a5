"""Ready engines for the usual kinds of training, so that a script does not write the step itself.

What lives here: functions that make an `Engine` around models, optimizers and losses, and attach what they are given.
What does not: the loop that runs the step (`engine`), and what is attached to an engine (`handlers`, `metrics`,
`checkpoint`).
"""

from allstep.trainers.adversarial import create_adversarial_trainer
from allstep.trainers.recurrent import create_recurrent_trainer
from allstep.trainers.supervised import create_supervised_evaluator, create_supervised_trainer

__all__ = [
    "create_adversarial_trainer",
    "create_recurrent_trainer",
    "create_supervised_evaluator",
    "create_supervised_trainer",
]
