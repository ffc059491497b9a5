"""What a window of iterations agreed, as pure functions of what all ranks said.

Contract: every rank calls these with the same result of a vote, policy and world size, and so decides the same without
another word. A `Ledger` says how many iterations of the window are run, whether the pass over the data ends with them,
and how many samples the whole world takes in each accumulation group; from that each rank knows its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from allstep.coordination.votes import VoteResult

Uneven = Literal["shortest", "longest", "error"]
POLICIES: tuple[Uneven, ...] = ("shortest", "longest", "error")

LONGEST_WINDOW = 32
LONG_WINDOW_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Ledger:
    """An agreed window.

    Attributes:
        iterations: how many of the window's iterations are run.
        ends_pass: whether the pass over the data ends after them.
        is_uneven: whether, where it ends, some ranks had a batch and others had none.
        group_totals: samples of all ranks in each accumulation group, the last of which may be short.
        group_size: iterations in a whole group.
    """

    iterations: int
    ends_pass: bool
    is_uneven: bool
    group_totals: tuple[int, ...]
    group_size: int

    def weight(self, at: int, samples: int, world_size: int) -> float:
        """Factor for a rank's mean-reduced loss over `samples` samples in the window's iteration `at`.

        DDP averages gradients over ranks, so that with this factor their sum over a group is the mean over all samples
        of the group.
        """
        total = self.group_totals[at // self.group_size]
        return samples * world_size / total if total else 0.0

    def ends_group(self, at: int) -> bool:
        """Whether the window's iteration `at` is the last of its group."""
        return (at + 1) % self.group_size == 0 or at + 1 == self.iterations


def agree_window(
    result: VoteResult, policy: Uneven, world_size: int, group_size: int, *, group_goes_on: bool, carried: int = 0
) -> Ledger:
    """Read from a vote's result where the window ends and what its groups hold.

    Args:
        result: what all ranks said of the window.
        policy: what ends a pass: the first rank without a batch ("shortest" and "error") or the last ("longest").
        world_size: number of ranks that are given different data.
        group_size: iterations in an accumulation group; the window begins with a group.
        group_goes_on: whether a group that the pass's end would cut short waits for the next pass.
        carried: iterations at the window's beginning whose batches waited in this way.
    """
    needed = 1 if policy == "longest" else world_size
    stop = next((at for at, having in enumerate(result.having) if having < needed), len(result.having))
    ends = stop < len(result.having)
    uneven = ends and result.having[stop] > 0
    # What was carried over has waited for this pass: it is run even if the pass is too short to complete the group.
    if ends and group_goes_on and stop > carried:
        stop -= stop % group_size
    totals = tuple(sum(result.samples[at : min(at + group_size, stop)]) for at in range(0, stop, group_size))
    return Ledger(stop, ends, uneven, totals, group_size)


def next_window(groups: int, microseconds: int, world_size: int, longest: int) -> int:
    """How many groups the window after next has, from agreed numbers only.

    Args:
        groups: groups in the last window.
        microseconds: what it took, summed over the ranks.
        world_size: number of ranks.
        longest: the most groups a window may have.
    """
    seconds = microseconds / world_size / 1e6
    # Between the two bounds the length stays, so that it does not go up and down with every window.
    if seconds > LONG_WINDOW_SECONDS:
        groups = groups // 2
    elif seconds < LONG_WINDOW_SECONDS / 2:
        groups = groups * 2
    return max(1, min(groups, longest))


def agree_length(lengths: Sequence[int | None], policy: Uneven) -> int | None:
    """Iterations in a pass over data whose length each rank knows; None when one does not."""
    known = [length for length in lengths if length is not None]
    if len(known) < len(lengths):
        return None
    return max(known) if policy == "longest" else min(known)
