"""Numbers that are summed over ranks in the votes that are held anyway, so that a handler needs no collective.

Contract: a handler's `attach` calls `engine.extension.sum_over_ranks`, on every rank alike; ranks compare the names
when a run begins. From then on each vote of that run carries the numbers. `read` is called on each rank when it casts a
vote, `landed` when the result has come, one window later, at the same iteration on all ranks. So the total is as of the
vote before. At an epoch's end it is as of now: `landed` is called once more just before the handlers of
EPOCH_COMPLETED. Calls of the two take turns.

Alone, where nobody votes, that is the only time, with this rank's number. Nothing here costs anything in an iteration.
What can go wrong: `read` or `landed` raises, which ends the run as an exception of a handler does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index


@dataclass(frozen=True, slots=True, eq=False)
class RankSum:
    """One number of each rank.

    Attributes:
        name: what ranks compare.
        read: gives this rank's number, an int; totals are kept in 64 bits with a sign.
        landed: called with the total over the ranks.
    """

    name: str
    read: Callable[[], int]
    landed: Callable[[int], None]


def read_sums(sums: Sequence[RankSum]) -> tuple[int, ...]:
    """This rank's numbers as of now."""
    return tuple(index(each.read()) for each in sums)


def land_sums(sums: Sequence[RankSum], totals: Sequence[int]) -> None:
    """Tell the handlers the totals, in the order of attaching."""
    for each, total in zip(sums, totals, strict=True):
        each.landed(total)
