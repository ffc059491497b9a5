"""`Schedule`: learning rates that change as a run goes on.

Contract: made from one of torch's schedulers, or from functions of how many steps have been taken. Attached to an
engine, it takes a step at each of the engine's events: after each optimizer step by default, so that accumulation
changes nothing, or at another event. It takes none for an iteration that is done again. Its state is in a checkpoint of
the engine. All ranks take the same steps, without asking each other, since all see the same events, the same sums of
samples and the same metrics. What can go wrong: with a metric that each rank computes for itself, ranks' rates differ.

With `batch_size` a schedule is a matter of samples: it goes on as fast as if each optimizer step had taken so many, of
all ranks together. So a run that goes on with more ranks, or larger batches, ends its schedule after the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from allstep.engine import Engine, Events
from allstep.engine.events import AnyEvent, is_count
from allstep.errors import ArgumentError, ArgumentTypeError

Factor = Callable[[int], float]


class Schedule:
    """Changes the learning rates of an optimizer during a run.

    Args:
        schedule: a scheduler of torch; or `steps -> factor`, by which the optimizer's rates are multiplied after so
            many steps; or one such function for each of its parameter groups, as a list or as a mapping from a group's
            number, or its "name", where groups that are not named keep their rates.
        optimizer: whose rates; only with functions, since a scheduler knows its own.
        warm_up: steps in which rates rise evenly, from 1 / (warm_up + 1) of the first rate on. The schedule itself
            begins behind them.
        batch_size: samples of all ranks for one step of the schedule; by default each event is one.
        metric: for ReduceLROnPlateau: the name of a metric of the engine that this is attached to, or
            `engine -> float`; the same number on all ranks.

    Attributes:
        scheduler: the scheduler of torch that does the work.

    Raises:
        ValueError: an argument is out of range, or arguments contradict each other.
        TypeError: schedule is neither a scheduler nor made of functions.
    """

    def __init__(
        self,
        schedule: LRScheduler | Factor | Sequence[Factor] | Mapping[int | str, Factor],
        optimizer: Optimizer | None = None,
        *,
        warm_up: int = 0,
        batch_size: int | None = None,
        metric: str | Callable[[Engine], float] | None = None,
    ) -> None:
        if not is_count(warm_up, least=0):
            raise ArgumentError(f"warm_up is {warm_up!r}; it must be a number of steps, an int of at least 0")
        if batch_size is not None and not is_count(batch_size, least=1):
            raise ArgumentError(f"batch_size is {batch_size!r}; it must be a number of samples, an int of at least 1")
        scheduler = _scheduler(schedule, optimizer)
        follows_metric = isinstance(scheduler, ReduceLROnPlateau)
        if follows_metric != (metric is not None):
            raise ArgumentError(
                f"metric is {metric!r}; it belongs to ReduceLROnPlateau, which needs it, and to no other schedule"
            )
        if follows_metric and (warm_up or batch_size):
            raise ArgumentError(
                "ReduceLROnPlateau has no steps to warm up in or to count samples for; attach another Schedule beside "
                "it, of torch's LinearLR, for a warm-up"
            )
        if warm_up:
            rising = LambdaLR(scheduler.optimizer, lambda step: (step + 1) / (warm_up + 1))
            scheduler = SequentialLR(scheduler.optimizer, [rising, scheduler], milestones=[warm_up])
        self.scheduler = scheduler
        self.batch_size = batch_size
        self.metric = metric
        self._samples = 0  # that have not made a step yet
        self._iteration = 0  # of the last step

    @property
    def rates(self) -> list[float]:
        """The present learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.scheduler.optimizer.param_groups]

    def attach(self, engine: Engine, event: AnyEvent | None = None, *, trainer: Engine | None = None) -> Schedule:
        """Take a step whenever `event` of `engine` is fired. Returns self.

        Args:
            engine: the engine that trains; with `metric` also one that evaluates.
            event: by default OPTIMIZER_STEP_COMPLETED. With `metric`, EPOCH_COMPLETED, or COMPLETED of an evaluator.
            trainer: the engine whose checkpoint has the state, where `engine` is an evaluator.

        Raises:
            ArgumentError: samples are to be counted at another event than OPTIMIZER_STEP_COMPLETED.
        """
        default = Events.OPTIMIZER_STEP_COMPLETED
        if self.metric is not None:
            default = Events.EPOCH_COMPLETED if trainer in (None, engine) else Events.COMPLETED
        if self.batch_size is not None:
            if event not in (None, default):
                raise ArgumentError(f"event is {event!r}; samples are counted at OPTIMIZER_STEP_COMPLETED, its default")
            engine.extension.count_samples()
        engine.add_event_handler(default if event is None else event, self._step)
        (engine if trainer is None else trainer).extension.add_state(self)
        return self

    def _step(self, engine: Engine) -> None:
        if self.metric is not None:
            self.scheduler.step(_score(self.metric, engine))  # type: ignore[arg-type]
            return
        at, steps = engine.state.iteration, 1
        # The iterations of a group that was left in its middle had their steps before they are done again.
        if at <= self._iteration and engine.extension.is_repeated:
            return
        self._iteration = at
        if self.batch_size is not None:
            steps, self._samples = divmod(self._samples + engine.extension.samples_in_group(), self.batch_size)
        for _ in range(steps):
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands. The rates themselves are the optimizer's."""
        return {"scheduler": self.scheduler.state_dict(), "samples": self._samples}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Raises ValueError when a key is missing."""
        missing = sorted({"scheduler", "samples"} - state_dict.keys())
        if missing:
            raise ArgumentError(f"the state of Schedule lacks {', '.join(missing)}; load what state_dict() gave")
        self.scheduler.load_state_dict(dict(state_dict["scheduler"]))
        self._samples = state_dict["samples"]


def _scheduler(schedule: Any, optimizer: Optimizer | None) -> LRScheduler:
    """The scheduler of torch that does what was given."""
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


def _score(metric: str | Callable[[Engine], float], engine: Engine) -> float:
    if not isinstance(metric, str):
        return float(metric(engine))
    metrics = engine.state.metrics
    if metric not in metrics:
        raise ArgumentError(
            f"the schedule follows the metric {metric!r}, and {engine.name} has {', '.join(metrics) or 'none'}; attach "
            "it to the engine that computes the metric, behind that"
        )
    return float(metrics[metric])
