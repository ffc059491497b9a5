"""Several numbers of a handler that are summed over the ranks together, in the votes that are held anyway.

Contract: `sum_together` is called by `attach`, on every rank alike. All numbers are read at once, and all totals of a
vote land at once, at the same iteration on all ranks. When that is, and what totals are as of: see `engine.rank_sums`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from allstep.engine import Engine


def sum_together(
    engine: Engine,
    owner: str,
    names: Sequence[str],
    read: Callable[[], Mapping[str, int]],
    landed: Callable[[dict[str, int]], None],
) -> None:
    """Have numbers summed over the ranks in the votes of the coming runs.

    Args:
        engine: whose votes they ride in.
        owner: whose numbers they are; ranks compare it, and the names, when a run begins.
        names: of the numbers, in an order that is the same on every rank.
        read: gives this rank's numbers by name; what it leaves out is 0.
        landed: called with the totals by name.
    """
    own: dict[str, int] = {}
    totals: dict[str, int] = {}

    # A vote reads, and lands, the numbers one by one in the order of attaching.
    def read_one(name: str) -> int:
        if name == names[0]:
            own.clear()
            own.update(read())
        return own.get(name, 0)

    def land_one(name: str, total: int) -> None:
        totals[name] = total
        if name == names[-1]:
            landed(dict(totals))

    for name in names:
        engine.extension.sum_over_ranks(f"{name} of {owner}", partial(read_one, name), partial(land_one, name))
