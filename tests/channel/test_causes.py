"""Which end is the cause of the others, and when there is enough to judge by."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from allstep.channel.causes import PATIENCE, SETTLE, UNEXPLAINED, due, judge
from allstep.channel.ending import WorkerEnd, about_another_rank, describe, exit_status
from allstep.channel.messages import Beat, Failure
from allstep.channel.record import Kind, Moment, Record
from tests.channel.driving import arrival

LOST = "Traceback (most recent call last):\nRuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:3456\n"
OWN = "Traceback (most recent call last):\nValueError: bad batch\n"


def rank(number: int, **what: Any) -> Record:
    """A record; moments are given as `failed=(order, seconds)`."""
    beat = Beat(number, 0, 1, 1, 7, "step", 0.0)
    record = Record(number, arrival(number), beat)
    for name in ("failed", "ended", "lost", "bye", "ordered", "hung"):
        if name in what:
            setattr(record, name, Moment(*what[name]))
    if "failed" in what:
        derived = what.get("derived", False)
        kind = "RuntimeError" if derived else "ValueError"
        record.failure = Failure(number, 0, 1, kind, f"of {number}", "", 1, 7, "step", derived)
    if "ended" in what:
        record.end = WorkerEnd(number, what["code"], what.get("killed", False), what.get("stderr", ""))
    if what.get("came") is False:
        record.arrival = record.beat = None
    return record


@pytest.mark.parametrize(
    ("records", "number", "kind"),
    [
        # order of arrival between equals
        ([rank(0, failed=(2, 0)), rank(1, failed=(1, 0))], 1, Kind.ERROR),
        # an error of its own before an error about another, whenever it came
        ([rank(0, failed=(1, 0), derived=True), rank(1, failed=(2, 3))], 1, Kind.ERROR),
        # a signal before an exception; not one that asks politely, nor allstep's own KILL
        ([rank(0, failed=(1, 0)), rank(1, ended=(2, 0), code=-9)], 1, Kind.SIGNAL),
        ([rank(0, failed=(1, 0)), rank(1, ended=(2, 0), code=-15)], 0, Kind.ERROR),
        ([rank(0, failed=(2, 0)), rank(1, ended=(1, 0), code=-9, killed=True)], 0, Kind.ERROR),
        # a rank is judged by its exception, not by how its process ended after that
        ([rank(0, failed=(1, 0), derived=True, ended=(3, 0), code=-6), rank(1, failed=(2, 0))], 1, Kind.ERROR),
        # leaving early before errors about it, after errors of their own
        ([rank(0, failed=(1, 0), derived=True), rank(1, ended=(2, 0), code=0)], 1, Kind.EARLY),
        ([rank(0, failed=(2, 0)), rank(1, ended=(1, 0), code=0)], 0, Kind.ERROR),
        # closing the World in order is a cause only where others could not go on
        ([rank(0, failed=(2, 0), derived=True), rank(1, bye=(1, 0))], 1, Kind.EARLY),
        ([rank(0, failed=(2, 0)), rank(1, bye=(1, 0))], 0, Kind.ERROR),
        ([rank(0, hung=(3, 0)), rank(1, bye=(1, 0), ended=(2, 0), code=0)], 0, Kind.HANG),
        # what never connected is judged by its last words
        ([rank(0, ended=(1, 0), code=1, stderr=LOST), rank(1, ended=(2, 0), code=1, stderr=OWN)], 1, Kind.EXIT),
        ([rank(0, ended=(1, 0), code=-6, stderr=LOST), rank(1, ended=(2, 0), code=1)], 1, Kind.EXIT),
        ([rank(0, ended=(2, 0), code=-6, stderr="free()"), rank(1, ended=(1, 0), code=1, stderr=LOST)], 0, Kind.SIGNAL),
        ([rank(0, ended=(1, 0), code=1, stderr=LOST + OWN * 12), rank(1, ended=(2, 0), code=1)], 0, Kind.EXIT),
        # who left when told to is no cause
        ([rank(0, ordered=(2, 0), ended=(3, 0), code=84), rank(1, failed=(1, 0))], 1, Kind.ERROR),
        ([rank(0, ordered=(2, 0), ended=(3, 0), code=-9), rank(1, failed=(4, 0))], 1, Kind.ERROR),
        # all only about each other: the first to say so
        ([rank(0, failed=(2, 0), derived=True), rank(1, failed=(1, 0), derived=True)], 1, Kind.DERIVED),
    ],
)
def test_the_cause_is_the_end_that_no_other_explains(records, number, kind):
    case = judge(records, supervised=True, attempt=0)
    assert (case.cause.rank, case.cause.kind) == (number, kind)
    assert [each.rank for each in case.others] == [1 - number]


def test_a_rank_that_waits_for_one_that_left_does_not_hide_it():
    waiting = rank(0, hung=(3, 0))
    waiting.beat = Beat(0, 0, 1, 1, 7, "step", 99.0, waiting="gradients")
    case = judge([waiting, rank(1, bye=(1, 0))], supervised=True, attempt=0)
    assert (case.cause.rank, case.cause.kind) == (1, Kind.EARLY)


@pytest.mark.parametrize(
    ("records", "at"),
    [
        ([rank(0), rank(1)], None),
        ([rank(0, bye=(1, 0)), rank(1)], None),
        ([rank(0), rank(1, failed=(1, 10.0))], 10.0 + SETTLE),
        # nothing is left to wait for
        ([rank(0, failed=(2, 11.0)), rank(1, failed=(1, 10.0))], 10.0),
        # an error about another's end waits for that end, for a bounded time
        ([rank(0, failed=(1, 10.0), derived=True), rank(1)], 10.0 + PATIENCE),
        ([rank(0, failed=(1, 10.0), derived=True), rank(1, failed=(2, 14.0))], 14.0),
        ([rank(0, failed=(1, 10.0), derived=True), rank(1, lost=(2, 10.0))], 10.0 + UNEXPLAINED + SETTLE),
        ([rank(0), rank(1, ended=(1, 10.0), code=0)], 10.0 + SETTLE),
        ([rank(0, ended=(2, 10.0), code=0), rank(1, ended=(1, 10.0), code=0)], None),
        ([rank(0, bye=(2, 9.0)), rank(1, ended=(1, 10.0), code=85)], None),
    ],
)
def test_when_to_judge(records, at):
    assert due(records, supervised=True) == (None if at is None else pytest.approx(at))


def test_without_a_supervisor_a_closed_connection_does_not_wait():
    assert due([rank(0), rank(1, lost=(1, 10.0))], supervised=False) == pytest.approx(10.0 + SETTLE)


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
    ],
)
def test_the_status_is_that_of_the_cause(record, status):
    assert judge([record, rank(1)], supervised=True, attempt=0).exit_code == status


def test_other_causes_come_before_what_followed_from_them():
    records = [
        rank(0, failed=(1, 0), derived=True),
        rank(1, failed=(3, 0)),
        rank(2),
        rank(3, failed=(2, 0)),
    ]
    case = judge(records, supervised=True, attempt=0)
    assert [case.cause.rank, *(each.rank for each in case.others)] == [3, 1, 0, 2]


@pytest.mark.parametrize(
    ("returncode", "status", "words"),
    [
        (0, 0, "exit code 0"),
        (7, 7, "exit code 7"),
        (-signal.SIGKILL, 137, "killed by SIGKILL (exit code 137)"),
        (-60, 188, "killed by signal 60 (exit code 188)"),
    ],
)
def test_an_end_is_named_as_a_shell_would_number_it(returncode, status, words):
    assert exit_status(returncode) == status
    assert describe(returncode) == words


@pytest.mark.parametrize(
    ("error", "derived"),
    [
        (RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:3456"), True),
        (RuntimeError("[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # somebody's download
        (ValueError("connection closed"), False),
    ],
)
def test_an_exception_about_another_rank_is_known_by_its_kind(error, derived):
    assert about_another_rank(error) is derived
