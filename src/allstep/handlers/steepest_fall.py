"""Where a loss falls fastest as the learning rate rises.

Contract: a pure function of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def steepest_fall(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which losses fall fastest by the rate's logarithm, before they are least; None where they never fall.

    Args:
        rates: rising, more than 0.
        losses: one for each rate; those that are not finite are passed over.
    """
    finite = [each if math.isfinite(each) else math.inf for each in losses]
    least = finite.index(min(finite, default=math.inf)) if finite else 0
    slopes = {
        (finite[at + 1] - finite[at]) / math.log(rates[at + 1] / rates[at]): rates[at]
        for at in range(least)
        if math.isfinite(finite[at])
    }
    steepest = min(slopes, default=0.0)
    return slopes[steepest] if steepest < 0 else None
