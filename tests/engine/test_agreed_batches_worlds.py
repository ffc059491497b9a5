"""Drawn worlds of simulated ranks: all see the same, and it is what a model without votes and windows says."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from allstep.engine import Events
from tests.engine.agreed_worlds import REPLACEMENT, Drawn, Log, Outcome, drawn_worlds, expect, run_world

ACTS: Any = ("terminate", "terminate_epoch", "interrupt")
SOME = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=400, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck))


def check_same_everywhere(logs: list[Log]) -> None:
    first = logs[0]
    for log in logs[1:]:
        assert log.events == first.events
        assert log.error == first.error
        assert log.calls == first.calls
        assert log.stop_reason == first.stop_reason
        assert log.epoch_length == first.epoch_length
        assert log.unread == first.unread
        assert [(s.epoch, s.iteration, s.group_end) for s in log.steps] == [
            (s.epoch, s.iteration, s.group_end) for s in first.steps
        ]


def check_weights(drawn: Drawn, logs: list[Log]) -> None:
    """Groups begin with the epoch, are whole but for its last, and weigh every sample of all ranks the same."""
    size = len(logs)
    if size == 1 and drawn.accumulate == 1:
        assert all((step.weight, step.group_end) == (1.0, True) for step in logs[0].steps)
        return
    for _, of_epoch in groupby(range(len(logs[0].steps)), key=lambda at: logs[0].steps[at].epoch):
        places = list(of_epoch)
        for begin in range(0, len(places), drawn.accumulate):
            group = places[begin : begin + drawn.accumulate]
            ends = [logs[0].steps[at].group_end for at in group]
            is_last = begin + drawn.accumulate >= len(places)
            assert not any(ends[:-1])
            assert ends[-1] or (is_last and logs[0].error is not None)
            if not ends[-1]:
                continue
            total = sum(log.steps[at].rows for log in logs for at in group)
            for log in logs:
                for at in group:
                    step = log.steps[at]
                    assert step.weight == pytest.approx(step.rows * size / total, rel=1e-12)


def landed(logs: list[Log]) -> tuple[set[tuple[int, int]], tuple[int, int, bool] | None]:
    events = logs[0].events
    cut = {(epoch, iteration) for name, epoch, iteration, *_ in events if name == Events.TERMINATE_SINGLE_EPOCH.name}
    stopped = [(epoch, at) for name, epoch, at, _, why in events if name == Events.TERMINATE.name and why is not None]
    completed = [epoch for name, epoch, *_ in events if name == Events.EPOCH_COMPLETED.name]
    return cut, (*stopped[0], stopped[0][0] in completed) if stopped else None


def check_model(drawn: Drawn, logs: list[Log], expected: Outcome) -> None:
    seen = [(step.epoch, step.iteration, [log.steps[at].name for log in logs]) for at, step in enumerate(logs[0].steps)]
    error = logs[0].error
    if error is None:
        assert not expected.is_empty
        assert drawn.policy != "error" or expected.uneven_at is None or expected.uneven_at == len(expected.steps)
        assert seen == expected.steps
        assert logs[0].epoch_length == expected.epoch_length
    elif error[0] == "DataError":
        assert expected.is_empty
        assert "empty" in error[1]
    else:
        assert error[0] == "UnevenDataError"
        assert drawn.policy == "error"
        assert seen == expected.steps[: len(seen)]
        counts = [shelf.counts for shelf in drawn.shelves]
        assert len(set(counts)) > 1 or {shelf.kind for shelf in drawn.shelves} & {"stream", "generator"}


def check_unread(drawn: Drawn, logs: list[Log], expected: Outcome) -> None:
    for epoch, wanted in expected.unread.items():
        if epoch not in logs[0].unread:
            continue
        told = {each.rank: (each.batches, each.samples) for each in logs[0].unread[epoch]}
        for shelf, (batches, samples) in zip(drawn.shelves, wanted, strict=True):
            if not batches:
                assert shelf.rank not in told
            elif shelf.kind == "plain":
                assert told[shelf.rank] == (batches, samples)
            else:
                assert 1 <= told[shelf.rank][0] <= batches
                assert shelf.kind != "list" or told[shelf.rank][0] == batches
                assert told[shelf.rank][1] <= samples


def check_stops(drawn: Drawn, logs: list[Log]) -> None:
    """Each request of a step or handler lands by the end of the next window, or at once at an epoch's end."""
    steps, events = logs[0].steps, logs[0].events
    cut, ended = landed(logs)
    if (len(logs) == 1 and drawn.accumulate == 1) or not events:
        return
    boundary = {step.iteration for step in steps if step.group_end} | {0}
    assert all(iteration in boundary for _, iteration in cut)
    assert ended is None or ended[1] in boundary
    last = events[-1]
    for act, epoch, iteration, event in (each for log in logs for each in log.asked):
        if act == "set_data":
            continue
        if act == "terminate_epoch":
            ends = [it for name, e, it, *_ in events if e == epoch and name in ("EPOCH_COMPLETED", "TERMINATE")]
            if not ends or logs[0].error:
                continue
            stopped_at = max(iteration, ends[0])
        elif act == "interrupt":
            stops = [it for name, _, it, *_ in events if name in ("INTERRUPT", "TERMINATE", "COMPLETED")]
            after = [it for it in stops if it >= iteration]
            if logs[0].error or not after:
                continue
            stopped_at = after[0]
        else:
            stopped_at = last[2]
        between = [step for step in steps if iteration < step.iteration <= stopped_at and step.epoch >= epoch]
        in_iteration = event in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED)
        here = [step.window_ends_at for step in steps if step.iteration == iteration and in_iteration]
        windows = {step.window_ends_at for step in between} | set(here)
        assert len(windows) <= 2, (act, epoch, iteration, stopped_at)
        if drawn.window == 1 and between:
            assert len({step.window_ends_at for step in between}) <= 1


def check(drawn: Drawn) -> None:
    check_logs(drawn, run_world(drawn))


def check_logs(drawn: Drawn, logs: list[Log]) -> None:
    check_same_everywhere(logs)
    check_weights(drawn, logs)
    check_stops(drawn, logs)
    cut, ended = landed(logs)
    expected = expect(drawn, cut, ended)
    check_model(drawn, logs, expected)
    check_unread(drawn, logs, expected)


def check_replaced(drawn: Drawn) -> None:
    check_replaced_logs(drawn, run_world(drawn))


def check_replaced_logs(drawn: Drawn, logs: list[Log]) -> None:
    check_same_everywhere(logs)
    check_weights(drawn, logs)
    check_stops(drawn, logs)
    for log in logs:
        names = [step.name for step in log.steps if step.name is not None]
        for before, after in pairwise(names):
            assert after == before + 1 or after % 1000 == 0, (before, after)
        replaced = [name >= REPLACEMENT for name in names]
        assert replaced == sorted(replaced)


@SOME
@given(drawn_worlds())
def test_ranks_of_any_lengths_and_kinds_take_the_batches_that_the_policy_says(drawn: Drawn) -> None:
    check(drawn)


@SOME
@given(drawn_worlds(acts=ACTS, policies=("shortest", "longest")))
def test_a_request_of_any_rank_at_any_moment_stops_all_alike(drawn: Drawn) -> None:
    check(drawn)


@SOME
@given(drawn_worlds(acts=(*ACTS, "set_data"), policies=("shortest", "longest")))
def test_any_rank_may_replace_its_data_at_any_moment(drawn: Drawn) -> None:
    check_replaced(drawn)


@pytest.mark.nightly
@MANY
@given(drawn_worlds())
def test_ranks_with_any_data_take_the_batches_that_the_policy_says(drawn: Drawn) -> None:
    check(drawn)


@pytest.mark.nightly
@MANY
@given(drawn_worlds(acts=ACTS))
def test_many_requests_of_any_rank_at_any_moment_stop_all_at_one_place(drawn: Drawn) -> None:
    check(drawn)


@pytest.mark.nightly
@MANY
@given(drawn_worlds(acts=(*ACTS, "set_data")))
def test_many_ranks_may_replace_their_data_at_any_moment(drawn: Drawn) -> None:
    check_replaced(drawn)
