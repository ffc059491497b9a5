"""`EMA` and `SWA`: averages of a model's weights over a run.

Contract: each is torch's `AveragedModel` of the module inside DDP, so it can be called, evaluated and saved as a
module. It is attached to the engine that trains, and updated after optimizer steps (`EMA`) or epochs (`SWA`). All
ranks have the same weights, so each of them averages for itself and none waits. Buffers, such as BatchNorm's
statistics, are each rank's own in between; `applied` and `create_supervised_evaluator` have all ranks use rank 0's.

Of a model that is sharded over ranks each rank averages its own parts, so that none holds the whole. Such an average
has no forward pass of its own: called, it lends its weights to the model for that call. All ranks then call it
together, as they do the model.

`applied` puts the averaged weights into the model itself, for the body of a `with` statement, and takes them out again
bit for bit. What can go wrong: training or saving inside of it would mix the two, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from allstep.engine import Engine, Events
from allstep.engine.events import AnyEvent, check_count
from allstep.errors import ArgumentError, ArgumentTypeError, EngineError
from allstep.handlers.model_parts import (
    copy_shards,
    copy_values,
    is_in_parts,
    kept_modes,
    parts_by_kind,
    refuse_whole_copy,
    swap_values,
)
from allstep.handlers.sample_counts import count_group_samples
from allstep.parallel import unwrap
from allstep.world import World

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class AveragedWeights(AveragedModel):
    """An average of a model's weights; made as an `EMA` or an `SWA`."""

    def __init__(self, model: nn.Module, device: torch.device | str | None, **how: Any) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model is {model!r}; give the module whose weights are to be averaged")
        inner = unwrap(model)
        in_parts = is_in_parts(inner)
        if in_parts and device is not None:
            raise ArgumentError(
                f"device is {device!r}, but the model is sharded over ranks: each averages its parts where they are; "
                "leave device out"
            )
        # torch copies what it is given, which FSDP's modules refuse.
        given = nn.Module() if in_parts else inner
        super().__init__(given, torch.device(device) if device is not None else None, **how)
        self._is_in_parts = in_parts
        if in_parts:
            self.module = copy_shards(inner)
        self.requires_grad_(False)
        self._source = (inner,)  # in a tuple, so that it is no part of this module
        self._is_applied = self._has_peers = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the model itself hold the averaged weights in the body, for an evaluation.

        Every rank enters it at the same point. Before the first update the model keeps its own weights.

        Raises:
            EngineError: it is entered already.
        """
        if self._is_applied:
            raise EngineError("the averaged weights are in the model already; leave the first applied() before another")
        if not self.n_averaged:
            yield
            return
        world = World.current()
        if self._has_peers and world is not None and any(True for _ in self.module.buffers()):
            world.unify_buffers(self.module)
        with self._lent():
            yield

    @contextmanager
    def _lent(self) -> Iterator[nn.Module]:
        (model,) = self._source
        swap_values(self.module, model)
        self._is_applied = True
        try:
            yield model
        finally:
            self._is_applied = False
            swap_values(self.module, model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged model's forward pass; without gradients where the model is sharded."""
        if not self._is_in_parts:
            return self.module(*args, **kwargs)
        (model,) = self._source
        if self._is_applied or not self.n_averaged:
            return model(*args, **kwargs)
        # A backward pass would come when the weights are out again.
        with torch.no_grad(), kept_modes(model), self._lent():
            return model.train(self.training)(*args, **kwargs)

    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights of the model into the average."""
        if not self._is_in_parts:
            super().update_parameters(model)
            return
        if not self.n_averaged:
            copy_values(model, self.module)
        else:
            average = self.multi_avg_fn or get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
            for owns, others in parts_by_kind(self.module, model, buffers=self.use_buffers):
                average(owns, others, int(self.n_averaged))
            if not self.use_buffers:
                copy_values(model, self.module, parameters=False)
        self.n_averaged += 1

    def _listen(self, engine: Engine, event: AnyEvent) -> None:
        if not self._is_in_parts:
            refuse_whole_copy(*self._source, type(self).__name__)
        self._has_peers = engine.coordinator.world_size > 1
        engine.add_event_handler(event, self._update)
        engine.extension.add_state(self)

    def _update(self, engine: Engine) -> None:
        self._check_not_applied("trained")
        self.update_parameters(*self._source)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module. Raises EngineError inside `applied`."""
        self._check_not_applied("saved")
        return super().state_dict(*args, **kwargs)

    def _check_not_applied(self, what: str) -> None:
        if self._is_applied:
            raise EngineError(
                f"the model cannot be {what} while it holds its averaged weights; leave the body of applied() first"
            )


class EMA(AveragedWeights):
    """An exponential moving average of a model's weights.

    Args:
        model: wrapped or not.
        decay: how much of the average stays at an update, 0 to 1.
        warm_up: begin with a smaller decay, (1 + n) / (10 + n) in update n, until that is more than `decay`.
        batch_size: samples of all ranks for which `decay` is meant: a step on k times as many decays k times, so that
            the average reaches back over as much data at another world or batch size (Busbridge et al., "How to Scale
            Your EMA", 2023). By default each update decays once.
        buffers: "copy" takes the model's, "average" averages those with it, such as BatchNorm's statistics.
        device: where the average is; by default where the model is.

    Raises:
        ValueError: an argument is out of range.
        TypeError: model is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        *,
        warm_up: bool = False,
        batch_size: int | None = None,
        buffers: Literal["copy", "average"] = "copy",
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 <= decay <= 1:
            raise ArgumentError(f"decay is {decay!r}; it must be from 0 to 1")
        check_count("batch_size", batch_size, 1, "samples", optional=True)
        if buffers not in ("copy", "average"):
            raise ArgumentError(f'buffers is {buffers!r}; it must be "copy" or "average"')
        super().__init__(model, device, use_buffers=buffers == "average")
        self.decay = decay
        self.warm_up = warm_up
        self.batch_size = batch_size

    def attach(self, engine: Engine, event: AnyEvent = Events.OPTIMIZER_STEP_COMPLETED) -> EMA:
        """Update the average whenever `event` of `engine` is fired. Returns self.

        Raises:
            ArgumentError: samples are to be counted at another event than OPTIMIZER_STEP_COMPLETED.
        """
        if self.batch_size is not None:
            count_group_samples(engine, event)
        self._listen(engine, event)
        return self

    def _update(self, engine: Engine) -> None:
        updates, decay = int(self.n_averaged), self.decay
        if self.warm_up:
            decay = min(decay, (1 + updates) / (10 + updates))
        if self.batch_size is not None:
            decay **= engine.extension.samples_in_group() / self.batch_size
        self.multi_avg_fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        super()._update(engine)


class SWA(AveragedWeights):
    """Stochastic weight averaging: the mean of a model's weights at the ends of epochs.

    Args:
        model: wrapped or not.
        start: the first epoch whose weights are taken, from 1.
        every: take those of each so many epochs from there on.
        device: where the average is; by default where the model is.

    Raises:
        ValueError: start or every is out of range.
        TypeError: model is no module.
    """

    def __init__(
        self, model: nn.Module, start: int, *, every: int = 1, device: torch.device | str | None = None
    ) -> None:
        check_count("start", start, 1, "epochs")
        check_count("every", every, 1, "epochs")
        super().__init__(model, device)
        self.start = start
        self.every = every

    def attach(self, engine: Engine) -> SWA:
        """Take the weights at the ends of epochs of `engine`. Returns self."""
        self._listen(engine, Events.EPOCH_COMPLETED(every=self.every, after=self.start - 1))
        return self

    def update_batch_norm(self, data: Iterable[Any]) -> None:
        """Give the averaged model's BatchNorm layers the statistics that it has over some data.

        The weights between which the average lies had other statistics than it has. Every rank calls this at the same
        point, with its own part of the data, as `world.loader` gives it; all get the mean over all batches.

        Args:
            data: batches of inputs, or of tuples that begin with them. Where the model is sharded all ranks need
                equally many.
        """
        if not self._is_in_parts:
            self._update_norms(self, data)
        elif self.n_averaged:
            with self.applied():
                self._update_norms(*self._source, data)

    def _update_norms(self, model: nn.Module, data: Iterable[Any]) -> None:
        norms = [each for each in model.modules() if isinstance(each, _NORMS) and each.running_mean is not None]
        if not norms:
            return
        update_bn(data, model, next(self.module.parameters()).device)
        world = World.current()
        if world is None or not self._has_peers:
            return
        # How many batches a rank had, which is the same in all layers, and its sums over them.
        batches = int(norms[0].num_batches_tracked or 0)
        buffers = [buffer for each in norms for buffer in (each.running_mean, each.running_var) if buffer is not None]
        sums = torch.cat([buffer.double() * batches for buffer in buffers])
        total = world.all_reduce(batches)
        means = world.all_reduce(sums) / total
        for buffer, mean in zip(buffers, means.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean)
        for each in norms:
            each.num_batches_tracked = torch.full_like(each.num_batches_tracked, total)  # type: ignore[arg-type]
