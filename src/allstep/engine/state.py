"""Where a run stands, for handlers, steps and users to read and to add to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from allstep.coordination import Outcome
from allstep.errors import EngineError


class State:
    """The state of an engine's run. Users may set further attributes.

    Attributes:
        iteration: iterations begun since the run started anew, over all epochs; 1 during the first.
        epoch: epochs begun; 1 during the first.
        epoch_length: iterations in an epoch, as far as its data tells beforehand; None while unknown.
        max_epochs: epochs after which the run is done, or None.
        max_iters: iterations after which the run is done, or None.
        batch: what the step was given last.
        output: what the step returned last.
        metrics: results by name.
        dataloader: the data being run over.
        seed: the world's seed, or None.
        times: seconds of the last epoch under "EPOCH_COMPLETED" and of the run under "COMPLETED".
        weight: factor for a mean-reduced loss that makes the gradient the mean over all samples of the accumulation
            group, over all ranks: 1.0 in a world of one without gradient accumulation, 0.0 in a filler.
        group_end: whether the optimizer is due after this iteration: always, without gradient accumulation.
        active: whether this rank has a batch of its own in this iteration; False while it runs a filler.
        inner_iterations: iterations that ended no accumulation group; 0 without gradient accumulation. Below 0 it may
            be where a run went on with larger batches, so that `optimizer_steps` counts those that were made.
        samples: samples in this rank's batch, 0 in a filler; None in a world of one where nothing weighs by them.
        unread: what each rank left unread when the last epoch ended because another one ran out.
        stop_reason: which rank ended the run and why; None while nobody did.
        outcome: what that end means for a run that goes on from it, as `terminate` was told; None while nobody did.
    """

    _skip: Callable[[], None] | None = None  # set by the engine that this is the state of

    def __init__(self, **attributes: Any) -> None:
        self.iteration: int = 0
        self.epoch: int = 0
        self.epoch_length: int | None = None
        self.max_epochs: int | None = None
        self.max_iters: int | None = None
        self.batch: Any = None
        self.output: Any = None
        self.metrics: dict[str, Any] = {}
        self.dataloader: Any = None
        self.seed: int | None = None
        self.times: dict[str, float | None] = {"EPOCH_COMPLETED": 0.0, "COMPLETED": 0.0}
        self.weight: float = 1.0
        self.group_end: bool = True
        self.active: bool = True
        self.inner_iterations: int = 0
        self.samples: int | None = None
        self.unread: tuple[Any, ...] = ()
        self.stop_reason: str | None = None
        self.outcome: Outcome | None = None
        for name, value in attributes.items():
            setattr(self, name, value)

    def skip(self) -> None:
        """Have this rank's batch count for nothing in the present iteration; called in the step, on any rank alone.

        The step goes on to its backward pass, because the other ranks wait for this one there: the gradients that come
        of it are zero, even those of a loss that is NaN. `weight` is 0, `samples` 0 and `active` false until the
        iteration ends, so metrics leave it out. Other ranks keep their weights. Called before the forward pass it
        leaves no trace in buffers either, such as BatchNorm's statistics.

        Raises:
            EngineError: this is not the state of an engine that is running.
        """
        if self._skip is None:
            raise EngineError("state.skip() was called on a state that no engine runs; call engine.state.skip()")
        self._skip()

    def skip_with(self, skip: Callable[[], None]) -> None:
        """Be the state of the engine whose `skip` this is; called by that engine."""
        self._skip = skip

    @property
    def optimizer_steps(self) -> int:
        """Accumulation groups that have ended since the run started anew: steps that an optimizer was due for."""
        return self.iteration - self.inner_iterations

    def __getstate__(self) -> dict[str, Any]:
        # A copy, pickled or not, is the state of no engine.
        return {name: value for name, value in vars(self).items() if name != "_skip"}

    def __repr__(self) -> str:
        lines = ["State:"]
        for name, value in vars(self).items():
            if name.startswith("_"):
                continue
            shown = value if isinstance(value, int | float | str | type(None)) else type(value)
            lines.append(f"\t{name}: {shown}")
        return "\n".join(lines) + "\n"


def is_one_number(value: Any) -> bool:
    """Whether a result or an output is a single number: of Python, or in a tensor or an array of one element."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) or (isinstance(value, np.generic | np.ndarray) and value.size == 1)
