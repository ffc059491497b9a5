"""`ExponentialAverage`: numbers one after another, smoothed.

Contract: each number counts less than the next one by a constant factor. The average is divided by the sum of these
weights, so it is not drawn towards 0 at its beginning: that of one number is the number.
"""

from __future__ import annotations


class ExponentialAverage:
    """The average of the numbers that it was called with.

    Args:
        stays: how much of the average stays when a number comes, from 0 to less than 1.
    """

    def __init__(self, stays: float) -> None:
        self._stays = stays
        self._sum = self._weight = 0.0

    def __call__(self, value: float) -> float:
        """Take a number in; the average with it."""
        self._sum = self._stays * self._sum + (1 - self._stays) * value
        self._weight = self._stays * self._weight + (1 - self._stays)
        return self._sum / self._weight
