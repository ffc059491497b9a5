"""Plain running values over samples: `Mean`, `Sum`, `Max` and `Min`, which neither drift nor count a sample twice.

Contract: each is a torchmetrics metric, so that it can be mixed with others, combined by arithmetic and given to any
usage. `update` takes what a step returned: a number or a tensor without dimensions is a mean over the batch's samples
and stands for each of them; a tensor with dimensions holds one value a sample and is not weighed again. Sums are kept
in float64 with the part that each addition rounded away (Neumaier's form of Kahan's summation), so that their error
does not grow with the number of batches; counts, and sums of integers, are int64.
"""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics import Metric


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
        before = self.total
        added = torch.as_tensor(amount, dtype=before.dtype, device=before.device)
        self.total = before + added
        # The larger of the two loses nothing: what the sum lacks of the smaller one is exact.
        lost = torch.where(before.abs() >= added.abs(), before - self.total + added, added - self.total + before)
        self.residue = self.residue + torch.where(self.total.isfinite(), lost, 0.0)


class Mean(_Total):
    """Mean over all samples of all ranks.

    `update(value, samples)`: a mean over `samples` samples, or a tensor with one value a sample.
    """

    def update(self, value: torch.Tensor | float, samples: int | torch.Tensor = 1) -> None:
        """Take a batch in.

        Args:
            value: a number or tensor () that is the mean over the batch, or a tensor with one value a sample.
            samples: samples in the batch, an int; of no effect where `value` has one value a sample.

        Raises:
            TypeError: samples is not an integer.
        """
        number = _count(samples)
        if isinstance(value, torch.Tensor) and value.ndim:
            self._add(value.detach().to(self.total.dtype).sum())
            self.count = self.count + value.numel()
        else:
            self._add(value * number)
            self.count = self.count + number

    def compute(self) -> torch.Tensor:
        """The mean, float64, shape (); NaN over no sample."""
        return (self.total + self.residue) / self.count


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
            raise ValueError(f"dtype is {dtype}; a Sum is kept in torch.float64 or torch.int64")
        self.weighted = weighted
        self.integer = dtype == torch.int64
        self.add_state("whole", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, value: torch.Tensor | float, samples: int | torch.Tensor = 1) -> None:
        """Take a batch in; see `Mean.update`."""
        number = _count(samples)
        per_sample = isinstance(value, torch.Tensor) and value.ndim > 0
        amount = value.detach().sum() if isinstance(value, torch.Tensor) and per_sample and self.integer else value
        if isinstance(amount, torch.Tensor) and per_sample and not self.integer:
            amount = amount.detach().to(self.total.dtype).sum()
        if self.weighted and not per_sample:
            amount = amount * number
        if not self.integer:
            self._add(amount)
            return
        if isinstance(amount, float) or (isinstance(amount, torch.Tensor) and amount.is_floating_point()):
            raise TypeError(
                f"value is {value!r}; a Sum of integers takes integers, or make it Sum(dtype=torch.float64)"
            )
        self.whole = self.whole + amount

    def compute(self) -> torch.Tensor:
        """The sum, float64 or int64, shape ()."""
        return self.whole if self.integer else self.total + self.residue


class _Extreme(Weighted):
    """The greatest value; or, of negated values, the least."""

    value: torch.Tensor
    sign: float

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        reduction = "max" if self.sign > 0 else "min"
        beginning = torch.tensor(-self.sign * torch.inf, dtype=torch.float64)
        self.add_state("value", beginning, dist_reduce_fx=reduction)

    def update(self, value: torch.Tensor | float, samples: int | torch.Tensor = 1) -> None:
        """Take a number or a tensor in, element by element; `samples` is of no effect. NaN stays."""
        if isinstance(value, torch.Tensor) and value.numel() == 0:
            return
        found = torch.as_tensor(value, dtype=self.value.dtype, device=self.value.device).detach()
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


def _count(samples: int | torch.Tensor) -> int | torch.Tensor:
    integer = isinstance(samples, int) or (isinstance(samples, torch.Tensor) and not samples.is_floating_point())
    if not integer:
        raise TypeError(f"samples is {samples!r}; it must be an integer number of samples")
    return samples
