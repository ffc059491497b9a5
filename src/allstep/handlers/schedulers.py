"""Schedulers of torch: one that does what a person gave, and one with a warm-up before it.

Contract: each function here makes a scheduler, which sets the optimizer's rates to those of its first step, as torch's
own do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, SequentialLR

from allstep.errors import ArgumentError, ArgumentTypeError

Factor = Callable[[int], float]
"""`steps -> factor`: by what first rates are multiplied after so many steps."""


def scheduler_of(schedule: Any, optimizer: Optimizer | None) -> LRScheduler:
    """The scheduler that does what was given.

    Args:
        schedule: a scheduler, which is given back; a `Factor`; or factors for parameter groups, in a sequence or by
            their numbers or names.
        optimizer: whose rates; only with factors.

    Raises:
        ArgumentError: there is no optimizer, it is not the scheduler's, or groups do not fit.
        ArgumentTypeError: a factor is no function.
    """
    if isinstance(schedule, LRScheduler):
        if optimizer not in (None, schedule.optimizer):
            raise ArgumentError("optimizer is not the one that the scheduler was made with; leave it out")
        return schedule
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(
            f"optimizer is {optimizer!r}; a schedule of functions needs the optimizer whose rates it is"
        )
    return LambdaLR(optimizer, _factors(schedule, optimizer.param_groups))


def _factors(schedule: Any, groups: Sequence[Mapping[str, Any]]) -> list[Factor]:
    """A function for each parameter group."""
    if isinstance(schedule, Mapping):
        keys = [at if at in schedule else group.get("name") for at, group in enumerate(groups)]
        if unknown := [key for key in schedule if key not in keys]:
            raise ArgumentError(
                f"schedule names the parameter group {unknown[0]!r}, and the optimizer has {len(groups)} groups, named "
                f"{', '.join(repr(group.get('name')) for group in groups)}; name groups by their numbers or names"
            )
        functions = [schedule.get(key, lambda steps: 1.0) for key in keys]
    elif isinstance(schedule, Sequence):
        functions = list(schedule)
        if len(functions) != len(groups):
            raise ArgumentError(
                f"schedule has {len(functions)} functions, and the optimizer {len(groups)} parameter groups; give one "
                "for each, or a mapping of some"
            )
    else:
        functions = [schedule] * len(groups)
    for each in functions:
        if not callable(each):
            raise ArgumentTypeError(f"schedule has {each!r}; give a scheduler of torch or functions (steps) -> factor")
    return functions


def warmed_up(scheduler: LRScheduler, steps: int) -> LRScheduler:
    """Rates rise evenly, from 1 / (steps + 1) of the first rate on, and the scheduler begins behind that."""
    rising = LambdaLR(scheduler.optimizer, lambda step: (step + 1) / (steps + 1))
    return SequentialLR(scheduler.optimizer, [rising, scheduler], milestones=[steps])
