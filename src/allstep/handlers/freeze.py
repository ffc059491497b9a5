"""`Freeze`: layers that are not trained before a certain epoch, for fine-tuning one part of a model after another.

Contract: attached to the engine that trains, on every rank alike. Where an epoch starts it sets what requires
gradients, from the epoch's number alone, so a resumed run needs nothing of it in a checkpoint. Behind the handlers of
that event ranks see what has changed, and reduce it. Parameters that no rule names are left alone. A frozen parameter
has no gradient, so an optimizer passes it over, and its moments stay.

What stays is a frozen layer's mode: BatchNorm goes on taking statistics of batches while the model is in training mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from allstep.engine import Engine, Events
from allstep.engine.events import is_count
from allstep.errors import ArgumentError, ArgumentTypeError
from allstep.parallel import unwrap


class Freeze:
    """Trains parameters from certain epochs on only.

    Args:
        model: wrapped or not.
        until: by a pattern of names of parameters, such as "encoder.*" or "*.bias", the epoch from which on they are
            trained, counted from 1; None for never. Of several patterns that fit, the last one holds.

    Raises:
        ValueError: a pattern fits no parameter, or an epoch is out of range.
        TypeError: model is no module, or until no mapping.
    """

    def __init__(self, model: nn.Module, until: Mapping[str, int | None]) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model is {model!r}; give the module whose parameters are to be frozen")
        if not isinstance(until, Mapping):
            raise ArgumentTypeError(f'until is {until!r}; give epochs by patterns of names, such as {{"encoder.*": 3}}')
        self.model = model
        self.until = dict(until)
        names = [name for name, _ in unwrap(model).named_parameters()]
        for pattern, epoch in self.until.items():
            if epoch is not None and not is_count(epoch, least=1):
                raise ArgumentError(f"the epoch of {pattern!r} is {epoch!r}; it must be an int of at least 1, or None")
            if not any(fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                raise ArgumentError(f"the pattern {pattern!r} fits no parameter of the model, which has {shown}")

    def attach(self, engine: Engine) -> Freeze:
        """Freeze and unfreeze where epochs of `engine` start. Returns self."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._set)
        return self

    def is_trained(self, name: str, epoch: int) -> bool | None:
        """Whether a parameter is trained in an epoch, from 1; None where no rule names it."""
        fitting = [first for pattern, first in self.until.items() if fnmatchcase(name, pattern)]
        if not fitting:
            return None
        return fitting[-1] is not None and epoch >= fitting[-1]

    def _set(self, engine: Engine) -> None:
        for name, parameter in unwrap(self.model).named_parameters():
            trained = self.is_trained(name, engine.state.epoch)
            if trained is None or trained == parameter.requires_grad:
                continue
            parameter.requires_grad_(trained)
            if not trained:
                parameter.grad = None  # an optimizer would go on with it
