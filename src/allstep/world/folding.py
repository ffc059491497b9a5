"""Reducing one Python number from each rank: a pure function of the numbers in rank order.

Integers stay integers of any size; float sums are rounded once (`math.fsum`), so the result depends neither on the
order of the ranks nor on how a backend adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Op = Literal["sum", "mean", "min", "max", "product"]
Number = bool | int | float


def fold(numbers: Sequence[Number], op: Op) -> Number:
    """Reduce the ranks' numbers.

    `sum` and `product` of bools and ints are exact ints; `mean` is a float, rounded once from the exact sum of ints;
    `min` and `max` return one of the numbers, or NaN if there is one.
    """
    if op == "sum":
        return _sum(numbers)
    if op == "product":
        return math.prod(numbers)
    if op == "mean":
        return _sum(numbers) / len(numbers)
    for number in numbers:
        if math.isnan(number):
            return number
    return min(numbers) if op == "min" else max(numbers)


def _sum(numbers: Sequence[Number]) -> int | float:
    if not any(isinstance(number, float) for number in numbers):
        return sum(numbers)
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):  # fsum refuses opposite infinities and sums beyond the range of floats
        return sum(map(float, numbers))
