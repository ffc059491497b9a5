"""Simulated ranks meet in order, and one that fails lets none of the others wait."""

from __future__ import annotations

import pytest

from allstep.testing import SimulatedRank, SimulationError, simulate


def test_votes_are_summed_and_values_gathered_in_rank_order() -> None:
    def meet(rank: SimulatedRank) -> tuple[list[int], list[str], str]:
        pending = rank.vote([rank.rank, 1])
        gathered = rank.gather(f"r{rank.rank}")
        return pending.wait(), gathered, rank.broadcast(gathered[-1] if rank.rank == 2 else "", 2)

    assert simulate(meet, 3) == [([3, 3], ["r0", "r1", "r2"], "r2")] * 3


def test_the_rank_that_raised_is_heard_and_not_those_that_noticed() -> None:
    def fail(rank: SimulatedRank) -> None:
        if rank.rank == 2:
            raise KeyError("mine")
        rank.gather(None)

    with pytest.raises(KeyError, match="mine"):
        simulate(fail, 3)


def test_a_rank_that_does_not_come_is_named() -> None:
    def stay_away(rank: SimulatedRank) -> None:
        if rank.rank != 1:
            rank.gather(None)

    with pytest.raises(SimulationError, match=r"ranks \[1\] did not come"):
        simulate(stay_away, 3, timeout=0.2)
