"""When a checkpoint is due."""

from __future__ import annotations

from datetime import timedelta

import pytest

from allstep.checkpoint.save_schedule import SaveSchedule, SaveTimes, read_every
from allstep.coordination import Alone
from allstep.errors import ArgumentError
from allstep.protocol.save_record import MEASURE
from allstep.testing import SimulatedRank, simulate


@pytest.mark.parametrize(
    ("every", "times"),
    [
        (None, SaveTimes()),
        (500, SaveTimes(iterations=500)),
        ("500 iterations", SaveTimes(iterations=500)),
        ("epoch", SaveTimes(epochs=1)),
        ("2 epochs", SaveTimes(epochs=2)),
        ("10 minutes", SaveTimes(seconds=600)),
        ("1.5 hours", SaveTimes(seconds=5400)),
        (timedelta(seconds=5), SaveTimes(seconds=5)),
        (("epoch", 100, "1 minute"), SaveTimes(100, 1, 60)),
    ],
)
def test_every_is_read(every, times):
    assert read_every(every) == times


@pytest.mark.parametrize(
    "every", [0, -1, True, "", "often", "0 minutes", "1.5 epochs", timedelta(0), 2.5, ("epoch", 0)]
)
def test_what_cannot_be_meant_is_an_error(every):
    with pytest.raises(ArgumentError, match="every is"):
        read_every(every)


def test_iterations_are_due_at_the_first_group_after_each_multiple():
    schedule, due = SaveSchedule(SaveTimes(iterations=5), Alone(), 0), []
    for iteration in range(3, 30, 3):
        if schedule.iteration_is_due(iteration):
            due.append(iteration)
            schedule.saved(iteration)
    assert due == [6, 12, 15, 21, 27]


def test_a_resumed_run_counts_on():
    assert not SaveSchedule(SaveTimes(iterations=5), Alone(), 7).iteration_is_due(9)
    assert SaveSchedule(SaveTimes(iterations=5), Alone(), 7).iteration_is_due(10)


def test_epochs_are_due():
    schedule = SaveSchedule(SaveTimes(epochs=2), Alone(), 0)
    assert [schedule.epoch_is_due(epoch, 10 * epoch) for epoch in range(1, 5)] == [False, True, False, True]


def due_by_its_clock(coordinator: SimulatedRank, paces: list[float]) -> tuple[list[int], int]:
    now = 0.0
    schedule, due = SaveSchedule(SaveTimes(seconds=60), coordinator, 0, clock=lambda: now), []
    for iteration in range(1, 2001):
        now += paces[coordinator.rank]
        if schedule.iteration_is_due(iteration):
            due.append(iteration)
            schedule.saved(iteration)
    return due, coordinator.calls


def test_time_is_rank_0s_and_asked_for_seldom():
    (first, asked), (second, _) = simulate(due_by_its_clock, 2, [0.1, 7.0])
    assert first == second
    assert [round(each / 600) for each in first] == [1, 2, 3]
    assert all(600 <= later - sooner <= 660 for sooner, later in zip([0, *first], first, strict=False))
    assert asked < 100


@pytest.mark.parametrize("times", [SaveTimes(), SaveTimes(epochs=1), SaveTimes(iterations=50)])
def test_a_job_that_measures_its_saves_takes_one_after_its_first_group(
    times: SaveTimes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MEASURE, "1")
    schedule = SaveSchedule(times, Alone(), 7)
    assert schedule.iteration_is_due(8)
    schedule.saved(8)
    assert not schedule.iteration_is_due(9)
