"""Which ranks wait to begin, and for how long: decisions on a clock that the test sets."""

from __future__ import annotations

from typing import Any

import pytest

from allstep.monitor.admission import GATHER_S, RollCall
from tests.monitor.driving import registration

PATIENCE = 60.0


class Called:
    """A roll call of three, and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.roll: RollCall = RollCall(3, lambda: self.now)

    def comes(self, rank: int, peer: int | None = None, **other: Any) -> None:
        self.roll.add(registration(rank, other.pop("world_size", 3), **other), rank if peer is None else peer, PATIENCE)

    def at(self, now: float) -> str | None:
        self.now = now
        return self.roll.decision()


@pytest.fixture
def called() -> Called:
    return Called()


def test_all_that_fit_go_on_at_once(called: Called):
    called.comes(0)
    called.comes(1)
    assert called.at(1) is None
    called.comes(2)
    assert called.at(1) == ""


def test_who_did_not_come_is_named_when_patience_has_passed(called: Called):
    called.comes(0)
    called.comes(1)
    assert called.roll.deadline() == PATIENCE
    assert called.at(PATIENCE - 1) is None
    assert "did not arrive within 60 s: 2" in str(called.at(PATIENCE))


def test_an_objection_waits_a_moment_for_more_ranks(called: Called):
    called.comes(0)
    called.comes(1, world_size=4)
    assert called.roll.deadline() == GATHER_S
    assert called.at(0) is None
    assert "disagree about world_size" in str(called.at(GATHER_S))


@pytest.mark.parametrize("how", ["its peer closes", "a relay loses it"])
def test_when_the_misfit_has_gone_the_others_have_all_their_time(called: Called, how: str):
    called.comes(0)
    called.comes(1, world_size=4)
    called.now = GATHER_S / 2
    gone = called.roll.remove(1) if how == "its peer closes" else called.roll.remove_rank(1)
    assert [each.rank for each in gone] == [1]
    assert called.roll.deadline() == PATIENCE
    assert called.at(2 * GATHER_S) is None
    called.comes(1)
    called.comes(2)
    assert called.at(3 * GATHER_S) == ""


def test_one_that_came_twice_leaves_the_first_of_its_name_waiting(called: Called):
    called.comes(0)
    called.comes(0, 9, pid=999)
    called.roll.remove(9)
    assert called.roll.deadline() == PATIENCE
    assert called.roll.missing == {1, 2}


def test_an_objection_stays_while_the_one_it_is_about_does(called: Called):
    called.comes(0)
    called.comes(1, world_size=4)
    called.comes(2)
    called.roll.remove(2)
    assert called.roll.deadline() == GATHER_S


def test_nobody_waits_for_anybody_once_all_have_gone(called: Called):
    called.comes(0)
    called.roll.remove(0)
    assert called.roll.deadline() is None
    assert called.roll.decision() is None
