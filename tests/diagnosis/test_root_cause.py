"""Which end is the cause of the others, and when there is enough to judge by."""

from __future__ import annotations

from typing import Any

import pytest

from allstep.diagnosis.rank_outcome import OutcomeKind
from allstep.diagnosis.record import Moment, RankRecord
from allstep.diagnosis.root_cause import (
    CAUSE_WINDOW_S,
    DERIVED_WAIT_S,
    END_WAIT_S,
    EXIT_WAIT_S,
    PREEMPTION_WAIT_S,
    due,
    judge,
    preempted_alone,
    revised,
)
from allstep.protocol.messages import Failure, Heartbeat
from allstep.protocol.worker_exit import WorkerExit
from tests.monitor.driving import registration

LOST = "Traceback (most recent call last):\nRuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:3456\n"
OWN = "Traceback (most recent call last):\nValueError: bad batch\n"


def rank(number: int, **what: Any) -> RankRecord:
    """A record; moments are given as `failed=(order, seconds)`, or `seen` where the exception only left a run."""
    heartbeat = Heartbeat(number, 0, 1, 1, 7, what.get("section", "step"), 0.0, what.get("waiting", ""))
    record = RankRecord(number, registration(number), heartbeat, what.get("heard", 0.0))
    for name in ("ended", "lost", "goodbye", "ordered", "hung"):
        if name in what:
            setattr(record, name, Moment(*what[name]))
    for name in (each for each in ("seen", "failed") if each in what):
        derived = what.get("derived", False)
        kind = "RuntimeError" if derived else "ValueError"
        failure = Failure(number, 0, 1, kind, f"of {number}", "", 1, 7, "step", derived, leaving=name == "failed")
        record.note_failure(failure, Moment(*what[name]))
    if "ended" in what:
        record.end = WorkerExit(number, what["code"], what.get("killed", False), what.get("stderr", ""))
    if what.get("came") is False:
        record.registration = record.heartbeat = None
    return record


@pytest.mark.parametrize(
    ("records", "number", "kind"),
    [
        # order of arrival between equals
        ([rank(0, failed=(2, 0)), rank(1, failed=(1, 0))], 1, OutcomeKind.ERROR),
        # an abort without words may be what a library does whose peer has gone; with words of its own it is a crash
        ([rank(0, ended=(2, 0), code=-6), rank(1, ended=(1, 0), code=3)], 1, OutcomeKind.EXIT),
        ([rank(0, ended=(2, 0), code=-6, stderr="Aborted"), rank(1, ended=(1, 0), code=3)], 0, OutcomeKind.SIGNAL),
        # an error of its own before an error about another, whenever it came
        ([rank(0, failed=(1, 0), derived=True), rank(1, failed=(2, 3))], 1, OutcomeKind.ERROR),
        # a signal before an exception; not one that asks politely, nor allstep's own KILL
        ([rank(0, failed=(1, 0)), rank(1, ended=(2, 0), code=-9)], 1, OutcomeKind.SIGNAL),
        ([rank(0, failed=(1, 0)), rank(1, ended=(2, 0), code=-15)], 0, OutcomeKind.ERROR),
        ([rank(0, failed=(2, 0)), rank(1, ended=(1, 0), code=-9, killed=True)], 0, OutcomeKind.ERROR),
        # a rank is judged by its exception, not by how its process ended after that
        ([rank(0, failed=(1, 0), derived=True, ended=(3, 0), code=-6), rank(1, failed=(2, 0))], 1, OutcomeKind.ERROR),
        # leaving early before errors about it, after errors of their own
        ([rank(0, failed=(1, 0), derived=True), rank(1, ended=(2, 0), code=0)], 1, OutcomeKind.EARLY),
        ([rank(0, failed=(2, 0)), rank(1, ended=(1, 0), code=0)], 0, OutcomeKind.ERROR),
        # closing the World in order is a cause only where others could not go on
        ([rank(0, failed=(2, 0), derived=True), rank(1, goodbye=(1, 0))], 1, OutcomeKind.EARLY),
        ([rank(0, failed=(2, 0)), rank(1, goodbye=(1, 0))], 0, OutcomeKind.ERROR),
        ([rank(0, hung=(3, 0)), rank(1, goodbye=(1, 0), ended=(2, 0), code=0)], 0, OutcomeKind.HANG),
        # what never connected is judged by its last words
        ([rank(0, ended=(1, 0), code=1, stderr=LOST), rank(1, ended=(2, 0), code=1, stderr=OWN)], 1, OutcomeKind.EXIT),
        ([rank(0, ended=(1, 0), code=-6, stderr=LOST), rank(1, ended=(2, 0), code=1)], 1, OutcomeKind.EXIT),
        (
            [rank(0, ended=(2, 0), code=-6, stderr="free()"), rank(1, ended=(1, 0), code=1, stderr=LOST)],
            0,
            OutcomeKind.SIGNAL,
        ),
        ([rank(0, ended=(1, 0), code=1, stderr=LOST + OWN * 12), rank(1, ended=(2, 0), code=1)], 0, OutcomeKind.EXIT),
        # who left when told to is no cause
        ([rank(0, ordered=(2, 0), ended=(3, 0), code=84), rank(1, failed=(1, 0))], 1, OutcomeKind.ERROR),
        ([rank(0, ordered=(2, 0), ended=(3, 0), code=-9, killed=True), rank(1, failed=(4, 0))], 1, OutcomeKind.ERROR),
        ([rank(0, ordered=(2, 0), ended=(3, 0), code=-6), rank(1, failed=(1, 0))], 1, OutcomeKind.ERROR),
        # an exception that may have been caught: behind all that is known to have ended a rank, also the same rank
        ([rank(0, seen=(1, 0)), rank(1, failed=(2, 9))], 1, OutcomeKind.ERROR),
        ([rank(0, seen=(1, 0)), rank(1, ended=(2, 9), code=7)], 1, OutcomeKind.EXIT),
        ([rank(0, seen=(1, 0)), rank(1, ended=(2, 9), code=0)], 1, OutcomeKind.EARLY),
        ([rank(0, seen=(1, 0)), rank(1, hung=(2, 9))], 1, OutcomeKind.HANG),
        ([rank(0, seen=(1, 0), ended=(2, 9), code=-9), rank(1)], 0, OutcomeKind.SIGNAL),
        ([rank(0, seen=(1, 0), ended=(2, 9), code=0), rank(1)], 0, OutcomeKind.EARLY),
        ([rank(0, seen=(1, 0), hung=(2, 9)), rank(1, waiting="gradients")], 0, OutcomeKind.HANG),
        # and before what does not explain itself
        ([rank(0, seen=(1, 0)), rank(1, failed=(2, 9), derived=True)], 0, OutcomeKind.ERROR),
        ([rank(0, seen=(1, 0), ended=(2, 9), code=1), rank(1)], 0, OutcomeKind.ERROR),
        ([rank(0, seen=(1, 0)), rank(1, hung=(2, 9), waiting="gradients")], 0, OutcomeKind.ERROR),
        ([rank(0, seen=(1, 0), ended=(3, 9), code=-9, killed=True), rank(1, failed=(2, 9))], 1, OutcomeKind.ERROR),
        (
            [
                rank(0, seen=(2, 0)),
                rank(1, goodbye=(1, 0)),
            ],
            1,
            OutcomeKind.EARLY,
        ),
        # making room, where others could not go on without the rank
        ([rank(0, failed=(2, 0), derived=True), rank(1, ended=(1, 0), code=85)], 1, OutcomeKind.EARLY),
        ([rank(0, failed=(2, 0)), rank(1, ended=(1, 0), code=85)], 0, OutcomeKind.ERROR),
        # all only about each other: the first to say so
        ([rank(0, failed=(2, 0), derived=True), rank(1, failed=(1, 0), derived=True)], 1, OutcomeKind.DERIVED),
    ],
)
def test_the_cause_is_the_end_that_no_other_explains(records, number, kind):
    diagnosis = judge(records, supervised=True, attempt=0)
    assert (diagnosis.cause.rank, diagnosis.cause.kind) == (number, kind)
    assert [each.rank for each in diagnosis.others] == [1 - number]


def test_a_rank_that_waits_for_one_that_left_does_not_hide_it():
    waiting = rank(0, hung=(3, 0))
    waiting.heartbeat = Heartbeat(0, 0, 1, 1, 7, "step", 99.0, waiting="gradients")
    diagnosis = judge([waiting, rank(1, goodbye=(1, 0))], supervised=True, attempt=0)
    assert (diagnosis.cause.rank, diagnosis.cause.kind) == (1, OutcomeKind.EARLY)


@pytest.mark.parametrize(
    ("records", "at"),
    [
        ([rank(0), rank(1)], None),
        ([rank(0, goodbye=(1, 0)), rank(1)], None),
        ([rank(0), rank(1, failed=(1, 10.0))], 10.0 + CAUSE_WINDOW_S),
        # nothing is left to wait for
        ([rank(0, failed=(2, 11.0)), rank(1, failed=(1, 10.0))], 10.0),
        # an error about another's end waits for that end, for a bounded time
        ([rank(0, failed=(1, 10.0), derived=True), rank(1)], 10.0 + DERIVED_WAIT_S),
        ([rank(0, failed=(1, 10.0), derived=True), rank(1, failed=(2, 14.0))], 14.0),
        ([rank(0, failed=(1, 10.0), derived=True), rank(1, lost=(2, 10.0))], 10.0 + EXIT_WAIT_S + CAUSE_WINDOW_S),
        ([rank(0), rank(1, ended=(1, 10.0), code=0)], 10.0 + CAUSE_WINDOW_S),
        ([rank(0, ended=(2, 10.0), code=0), rank(1, ended=(1, 10.0), code=0)], None),
        ([rank(0, goodbye=(2, 9.0)), rank(1, ended=(1, 10.0), code=85)], None),
        # an exception that may be caught opens nothing; the rank it left may be about to say more
        ([rank(0), rank(1, seen=(1, 10.0))], None),
        ([rank(0, failed=(2, 11.0)), rank(1, seen=(1, 10.0))], 11.0 + CAUSE_WINDOW_S),
        ([rank(0, failed=(2, 11.0)), rank(1, seen=(1, 10.0), failed=(3, 11.1))], 11.0),
        ([rank(0, failed=(2, 11.0), derived=True), rank(1, seen=(1, 10.0))], 11.0 + CAUSE_WINDOW_S),
        ([rank(0), rank(1, seen=(1, 10.0), ended=(2, 20.0), code=1)], 20.0 + CAUSE_WINDOW_S),
    ],
)
def test_when_to_judge(records, at):
    assert due(records, supervised=True) == (None if at is None else pytest.approx(at))


def test_without_a_supervisor_a_closed_connection_waits_a_moment_for_the_end():
    assert due([rank(0), rank(1, lost=(1, 10.0))], supervised=False) == pytest.approx(10.0 + END_WAIT_S)
    ended = rank(1, lost=(1, 10.0), ended=(2, 10.0), code=-9)
    assert due([rank(0), ended], supervised=False) == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("record", "status"),
    [
        (rank(0, ended=(1, 0), code=-9), 137),
        (rank(0, ended=(1, 0), code=3), 3),
        (rank(0, failed=(1, 0)), 1),
        (rank(0, failed=(1, 0), ended=(2, 0), code=7), 7),
        (rank(0, hung=(1, 0)), 83),
        (rank(0, lost=(1, 0)), 84),
        (rank(0, ended=(1, 0), code=0), 1),
        (rank(0, ended=(1, 0), code=85), 85),
        (rank(0, seen=(1, 0)), 1),
    ],
)
def test_the_status_is_that_of_the_cause(record, status):
    assert judge([record, rank(1)], supervised=True, attempt=0).exit_code == status


def test_an_exception_that_was_seen_keeps_its_place_when_it_leaves():
    records = [rank(0, failed=(2, 0)), rank(1, seen=(1, 0), failed=(3, 0.1))]
    assert judge(records, supervised=True, attempt=0).cause.rank == 1


def test_an_exception_before_the_cause_on_the_same_rank_is_told():
    cause = judge([rank(0, seen=(1, 0), ended=(2, 9), code=-9), rank(1)], supervised=True, attempt=0).cause
    assert "before that, ValueError: of 0 left a run" in cause.note


@pytest.mark.parametrize(
    ("late", "number", "kind"),
    [
        # a kind that stands before the one of the verdict replaces it
        (rank(1, ended=(3, 1), code=-11), 1, OutcomeKind.SIGNAL),
        (rank(1, ordered=(2, 0.3), ended=(3, 0.3 + CAUSE_WINDOW_S / 2), code=-11), 1, OutcomeKind.SIGNAL),
        # but not where it had been ordered to leave for longer than such news takes
        (rank(1, ordered=(2, 0.3), ended=(3, 0.3 + 2 * CAUSE_WINDOW_S), code=-11), 0, OutcomeKind.ERROR),
        (rank(1, ordered=(2, 0.3), ended=(3, 3), code=-11), 0, OutcomeKind.ERROR),
        # the same kind, and all that followed from the verdict, does not
        (rank(1, failed=(3, 1)), 0, OutcomeKind.ERROR),
        (rank(1, ended=(3, 1), code=1), 0, OutcomeKind.ERROR),
        (rank(1, ended=(3, 1), code=0), 0, OutcomeKind.ERROR),
        (rank(1, ordered=(2, 0), ended=(3, 1), code=84), 0, OutcomeKind.ERROR),
        (rank(1, ordered=(2, 0), ended=(3, 1), code=-9, killed=True), 0, OutcomeKind.ERROR),
        (rank(1, ordered=(2, 0), ended=(3, 1), code=-6), 0, OutcomeKind.ERROR),
    ],
)
def test_what_comes_after_the_verdict_counts_where_it_stands_before_it(late, number, kind):
    first = rank(0, failed=(1, 0))
    diagnosis = judge([first, rank(1)], supervised=True, attempt=0)
    now = revised(diagnosis, [first, late], supervised=True)
    assert (now.cause.rank, now.cause.kind) == (number, kind)
    assert [each.rank for each in now.others] == [1 - number]


@pytest.mark.parametrize("late", [rank(1, failed=(3, 9)), rank(1, ended=(3, 9), code=0)])
def test_errors_about_another_rank_give_way_to_what_is_heard_of_it_later(late):
    first = rank(0, failed=(1, 0), derived=True)
    diagnosis = judge([first, rank(1)], supervised=True, attempt=0)
    assert diagnosis.cause.kind is OutcomeKind.DERIVED
    assert revised(diagnosis, [first, late], supervised=True).cause.rank == 1


def test_a_rank_that_seemed_frozen_and_had_crashed_is_named_for_the_crash():
    before = [rank(0, waiting="gradients"), rank(1, hung=(1, 0))]
    diagnosis = judge(before, supervised=True, attempt=0)
    assert (diagnosis.cause.rank, diagnosis.cause.kind) == (1, OutcomeKind.HANG)
    after = [before[0], rank(1, hung=(1, 0), ordered=(2, 0.3), ended=(3, 3), code=-11)]
    now = revised(diagnosis, after, supervised=True)
    assert (now.cause.rank, now.cause.kind, now.exit_code) == (1, OutcomeKind.SIGNAL, 139)


def test_a_rank_that_left_early_stays_the_cause():
    records = [rank(0, failed=(2, 0), derived=True), rank(1, goodbye=(1, 0), ended=(3, 0), code=0)]
    diagnosis = judge(records, supervised=True, attempt=0)
    assert revised(diagnosis, records, supervised=True).cause == diagnosis.cause


def test_a_rank_that_closed_its_world_and_then_makes_room_gives_that_status():
    before = [rank(0, failed=(2, 0), derived=True), rank(1, goodbye=(1, 0))]
    diagnosis = judge(before, supervised=True, attempt=0)
    assert diagnosis.exit_code == 1
    after = [before[0], rank(1, goodbye=(1, 0), ordered=(3, 0), ended=(4, 0), code=85)]
    now = revised(diagnosis, after, supervised=True)
    assert (now.cause.rank, now.cause.kind, now.exit_code) == (1, OutcomeKind.EARLY, 85)


@pytest.mark.parametrize(
    ("other", "now", "alone"),
    [
        # it trains on, long enough after for its last heartbeat not to be from before
        (rank(0, heard=20.0), 20.0, True),
        (rank(0, heard=20.0, section="data"), 20.0, True),
        (rank(0, heard=11.0), 20.0, False),
        # it saves, or does what is not known
        (rank(0, heard=20.0, section="checkpoint"), 20.0, False),
        (rank(0, heard=20.0, section="startup"), 20.0, False),
        (rank(0, came=False), 20.0, False),
        (rank(0, came=False), 10.0 + PREEMPTION_WAIT_S + 1, True),
        # it is preempted too, or has gone
        (rank(0, ended=(2, 12.0), code=85, heard=20.0), 10.0 + PREEMPTION_WAIT_S + 1, False),
        (rank(0, goodbye=(2, 12.0), heard=20.0), 10.0 + PREEMPTION_WAIT_S + 1, False),
    ],
)
def test_a_rank_preempted_while_others_go_on_was_preempted_alone(other, now, alone):
    records = [other, rank(1, ended=(1, 10.0), code=85)]
    assert preempted_alone(records, now, supervised=True) is alone
    if alone:
        diagnosis = judge(records, supervised=True, attempt=0)
        assert (diagnosis.cause.rank, diagnosis.cause.kind, diagnosis.exit_code) == (1, OutcomeKind.EARLY, 85)
        assert diagnosis.cause.what.startswith("left early: it was preempted (exit code 85)")


def test_other_causes_come_before_what_followed_from_them():
    records = [
        rank(0, failed=(1, 0), derived=True),
        rank(1, failed=(3, 0)),
        rank(2),
        rank(3, failed=(2, 0)),
    ]
    diagnosis = judge(records, supervised=True, attempt=0)
    assert [diagnosis.cause.rank, *(each.rank for each in diagnosis.others)] == [3, 1, 0, 2]
