"""Plain running values over samples: `Mean`, `Sum`, `Max` and `Min`, which neither drift nor count a sample twice.

Contract: each is a torchmetrics metric, so that it can be mixed with others, combined by arithmetic and given to any
usage. `update` takes what a step returned: a number or a tensor without dimensions is a mean over the batch's samples
and stands for each of them; a tensor with dimensions holds one value a sample and is not weighed again. numpy's numbers
and arrays, and lists, are taken as numbers and tensors. Sums are kept
in float64 beside what each addition rounded away (Knuth, The Art of Computer Programming, volume 2, section 4.2.2,
theorem B), so that their error does not grow with the number of batches; counts, and sums of integers, are int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import torch
from torchmetrics import Metric

from allstep.errors import ArgumentError, ArgumentTypeError

Value: TypeAlias = torch.Tensor | float | np.ndarray[Any, Any] | Sequence[float]


class Weighted(Metric):
    """A running value that is told how many samples a batch has."""

    full_state_update = False


class _Total(Weighted):
    """A compensated sum of `value * samples`, and the number of samples."""

    total: torch.Tensor
    residue: torch.Tensor
    count: torch.Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("residue", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, amount: torch.Tensor | float) -> None:
        # Knuth's two-sum: `lost` is exactly what rounding took from the sum.
        before = self.total
        after = before + amount
        taken = after - before
        lost = (before - (after - taken)) + (amount - taken)
        self.residue.add_(lost)
        before.copy_(after)

    def _sum(self) -> torch.Tensor:
        # Beyond the range of floats, and for NaN, what was lost is no number.
        return torch.where(self.residue.isfinite(), self.total + self.residue, self.total)


class Mean(_Total):
    """Mean over all samples of all ranks.

    `update(value, samples)`: a mean over `samples` samples, or a tensor with one value a sample.
    """

    def update(self, value: Value, samples: int | torch.Tensor = 1) -> None:
        """Take a batch in.

        Args:
            value: a number or tensor () that is the mean over the batch, or a tensor with one value a sample.
            samples: samples in the batch, an int; of no effect where `value` has one value a sample.

        Raises:
            ArgumentTypeError: value is no number and no tensor, or samples no integer.
        """
        number, value = _count(samples), _value(value)
        if not isinstance(value, torch.Tensor):
            self._add(value * number)
            self.count.add_(number)
            return
        exact = value.to(self.total)
        self._add(exact.sum() if value.ndim else exact * number)
        self.count.add_(value.numel() if value.ndim else number)

    def compute(self) -> torch.Tensor:
        """The mean, float64, shape (); NaN over no sample."""
        return self._sum() / self.count


class Sum(_Total):
    """Sum over all samples of all ranks.

    Args:
        weighted: a number or tensor () is a mean over the batch and is multiplied by its samples; False adds it as it
            is, for values that are totals already.
        dtype: `torch.int64` sums integers exactly, beyond 2^53.
    """

    whole: torch.Tensor

    def __init__(self, *, weighted: bool = True, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        super().__init__(**options)
        if dtype not in (torch.float64, torch.int64):
            raise ArgumentError(f"dtype is {dtype}; a Sum is kept in torch.float64 or torch.int64")
        self.weighted = weighted
        self.integer = dtype == torch.int64
        self.add_state("whole", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, value: Value, samples: int | torch.Tensor = 1) -> None:
        """Take a batch in; see `Mean.update`."""
        number, value = _count(samples) if self.weighted else 1, _value(value)
        if self.integer:
            self._add_integer(value, number)
        elif isinstance(value, torch.Tensor):
            exact = value.to(self.total)
            self._add(exact.sum() if value.ndim else exact * number)
        else:
            self._add(value * number)

    def _add_integer(self, value: torch.Tensor | float, number: int | torch.Tensor) -> None:
        if isinstance(value, float) or (isinstance(value, torch.Tensor) and value.is_floating_point()):
            raise ArgumentTypeError(
                f"value is {value!r}; a Sum of integers takes integers, or make it Sum(dtype=torch.float64)"
            )
        # One value a sample is summed as it is; one value a batch stands for each of its samples.
        per_sample = isinstance(value, torch.Tensor) and value.ndim > 0
        self.whole.add_(
            value.sum().to(self.whole) if isinstance(value, torch.Tensor) and per_sample else value * number
        )

    def compute(self) -> torch.Tensor:
        """The sum, float64 or int64, shape ()."""
        return self.whole if self.integer else self._sum()


class _Extreme(Weighted):
    """The greatest value; or, of negated values, the least."""

    value: torch.Tensor
    sign: float

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        reduction = "max" if self.sign > 0 else "min"
        beginning = torch.tensor(-self.sign * torch.inf, dtype=torch.float64)
        self.add_state("value", beginning, dist_reduce_fx=reduction)

    def update(self, value: Value, samples: int | torch.Tensor = 1) -> None:
        """Take a number or a tensor in, element by element; `samples` is of no effect. NaN stays."""
        value = _value(value)
        if isinstance(value, torch.Tensor) and value.numel() == 0:
            return
        if not isinstance(value, torch.Tensor):
            value = torch.full_like(self.value, value)  # without a copy from the host, for which it would wait
        found = value.to(self.value)
        if self.sign > 0:
            self.value = torch.maximum(self.value, found.max())
        else:
            self.value = torch.minimum(self.value, found.min())

    def compute(self) -> torch.Tensor:
        """The value, float64, shape ()."""
        return self.value


class Max(_Extreme):
    """The greatest value over all samples of all ranks."""

    sign = 1.0


class Min(_Extreme):
    """The least value over all samples of all ranks."""

    sign = -1.0


def _value(value: Value) -> torch.Tensor | float:
    """A value as a number of Python's own, whose arithmetic is exact enough, or as a tensor without a graph."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"value is a {type(value).__name__}, {value!r}; it must be a number or a tensor"
        ) from error


def _count(samples: Any) -> int | torch.Tensor:
    if isinstance(samples, np.ndarray):
        samples = torch.as_tensor(samples)
    if isinstance(samples, torch.Tensor) and not samples.is_floating_point():
        return samples
    if not isinstance(samples, Integral):
        raise ArgumentTypeError(f"samples is {samples!r}; it must be an integer number of samples")
    return int(samples)
