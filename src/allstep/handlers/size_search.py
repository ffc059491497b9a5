"""`SizeSearch`: which batch sizes to try, one after another, to find the largest that fits.

Contract: sizes are doubled until one is too large, and the gap between that and the largest that fits is halved then.
Arithmetic only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SizeSearch:
    """A search that has not ended while there is a size to try.

    Attributes:
        size: to try next; None at the end.
        most: no larger one is tried.
        halvings: how often the gap may still be halved.
        largest: that fits, of those that were tried; 0 while none does.
        too_large: the smallest that was tried and did not fit; None while all did.
    """

    size: int | None
    most: int
    halvings: int
    largest: int = 0
    too_large: int | None = None

    def note(self, size: int, fits: bool, *, is_last: bool) -> None:
        """Go on from what became of a size; `is_last` where a larger one would be no larger batch."""
        if fits:
            self.largest = size
        else:
            self.too_large = size
        if fits and is_last:
            self.size = None
        elif self.too_large is None:
            self.size = min(2 * size, self.most) if size < self.most else None
        else:
            middle = (self.largest + self.too_large) // 2
            self.size = middle if self.halvings and middle > self.largest else None
            self.halvings -= 1
