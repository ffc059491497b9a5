"""Silence while the service itself did not run is no silence."""

from __future__ import annotations

from allstep.monitor.driven_clock import DrivenClock
from tests.monitor.driving import Clock


def driven_until(clock: Clock, driven: DrivenClock, end: float) -> None:
    while clock.now < end:
        clock.now += 1.0
        driven.driven()


def test_what_was_heard_ages_while_the_service_runs():
    clock = Clock()
    driven = DrivenClock(clock)
    driven_until(clock, driven, 20.0)
    assert driven.age(5.0) == 15.0


def test_a_time_in_which_the_machine_was_suspended_does_not_count():
    clock = Clock()
    driven = DrivenClock(clock)
    driven_until(clock, driven, 20.0)
    clock.now += 3600.0
    driven.driven()
    assert driven.age(19.0) == 0.0
    driven_until(clock, driven, clock.now + 4.0)
    assert driven.age(19.0) == 4.0
