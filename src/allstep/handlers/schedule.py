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
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from allstep.engine import Engine, Events
from allstep.engine.events import AnyEvent, check_count
from allstep.errors import ArgumentError
from allstep.handlers.named_values import named_result, saved_values
from allstep.handlers.sample_counts import count_group_samples
from allstep.handlers.schedulers import Factor, scheduler_of, warmed_up


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
        check_count("warm_up", warm_up, 0, "steps")
        check_count("batch_size", batch_size, 1, "samples", optional=True)
        scheduler = scheduler_of(schedule, optimizer)
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
        self.scheduler = warmed_up(scheduler, warm_up) if warm_up else scheduler
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
            count_group_samples(engine, default if event is None else event)
        engine.add_event_handler(default if event is None else event, self._step)
        (engine if trainer is None else trainer).extension.add_state(self)
        return self

    def _step(self, engine: Engine) -> None:
        if self.metric is not None:
            metric = self.metric
            value = named_result(self, engine, metric) if isinstance(metric, str) else float(metric(engine))
            self.scheduler.step(value)  # type: ignore[arg-type]
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
        scheduler, self._samples = saved_values(self, state_dict, "scheduler", "samples")
        self.scheduler.load_state_dict(dict(scheduler))
