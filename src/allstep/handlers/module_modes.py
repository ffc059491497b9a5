"""Training or evaluation mode of every module of a model, kept over what changes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Have each module be in the mode behind the body that it was in before."""
    before = [(each, each.training) for each in model.modules()]
    try:
        yield
    finally:
        for each, mode in before:
            each.training = mode
