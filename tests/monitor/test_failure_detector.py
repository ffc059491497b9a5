"""What a detector makes of what it hears, with a clock that the test turns and no sockets."""

from __future__ import annotations

import pytest

from allstep.diagnosis.hang import HangLimits
from allstep.diagnosis.rank_outcome import OutcomeKind
from allstep.diagnosis.root_cause import END_WAIT_S
from allstep.monitor.driven_clock import DrivenClock
from allstep.monitor.failure_detector import FailureDetector
from allstep.monitor.service import MonitorEvent, Verdict
from allstep.protocol.worker_exit import WorkerExit
from tests.monitor.driving import registration


class Detecting:
    """A detector of two ranks whose Worlds are open."""

    def __init__(self, *, supervised: bool) -> None:
        self.now = 100.0
        self.events: list[MonitorEvent] = []
        self.detector = FailureDetector(
            2,
            attempt=0,
            supervised=supervised,
            limits=HangLimits(),
            clock=DrivenClock(lambda: self.now),
            events=self.events,
            ask_stacks=lambda: None,
        )
        for rank in range(2):
            self.detector.admitted(registration(rank), "")

    def pass_deadlines(self) -> None:
        """Turn the clock to each deadline, until there is none."""
        while (at := self.detector.deadline()) is not None:
            self.now = max(self.now, at)
            self.detector.tick()


@pytest.mark.parametrize("first", ["the end", "the loss"])
def test_a_supervised_node_lost_after_its_worlds_closed_is_the_cause(
    first: str,
) -> None:
    detected = Detecting(supervised=True)
    detector = detected.detector
    detector.said_goodbye(0)
    detector.said_goodbye(1)
    detected.pass_deadlines()
    assert detected.events == []
    if first == "the end":
        detector.ended(WorkerExit(0, 0))
    detector.node_lost([1], "was lost with node 1")
    if first == "the loss":
        detector.ended(WorkerExit(0, 0))
    detected.pass_deadlines()
    (verdict,) = detected.events
    assert isinstance(verdict, Verdict)
    cause = verdict.diagnosis.cause
    assert (cause.rank, cause.kind, cause.what, verdict.diagnosis.exit_code) == (
        1,
        OutcomeKind.NODE_LOST,
        "was lost with node 1",
        84,
    )


def test_an_unsupervised_rank_that_was_gone_before_its_node_is_the_cause() -> None:
    detected = Detecting(supervised=False)
    detected.detector.lost(1, "closed by the other side")
    detected.detector.node_lost([1], "was lost with node 1")
    detected.pass_deadlines()
    (verdict,) = detected.events
    assert isinstance(verdict, Verdict)
    assert verdict.diagnosis.cause.kind is OutcomeKind.LOST


def test_how_an_unsupervised_rank_ended_may_follow_its_connection() -> None:
    detected = Detecting(supervised=False)
    detected.detector.lost(1, "closed by the other side")
    detected.now += END_WAIT_S / 2
    detected.detector.tick()
    assert detected.events == []
    detected.detector.ended(WorkerExit(1, -9))
    detected.pass_deadlines()
    (verdict,) = detected.events
    assert isinstance(verdict, Verdict)
    assert (verdict.diagnosis.cause.rank, verdict.diagnosis.cause.kind) == (1, OutcomeKind.SIGNAL)


def test_an_unsupervised_process_may_fail_once_its_world_was_closed() -> None:
    detected = Detecting(supervised=False)
    detected.detector.said_goodbye(1)
    detected.detector.ended(WorkerExit(1, 3))
    detected.pass_deadlines()
    assert detected.events == []


def test_an_unsupervised_process_that_left_its_world_open_is_named() -> None:
    detected = Detecting(supervised=False)
    detected.detector.said_goodbye(1, closed=False)
    detected.detector.ended(WorkerExit(1, 3))
    detected.pass_deadlines()
    (verdict,) = detected.events
    assert isinstance(verdict, Verdict)
    assert (verdict.diagnosis.cause.rank, verdict.diagnosis.cause.what) == (1, "exit code 3")


def test_an_unsupervised_node_may_go_after_its_worlds_closed() -> None:
    detected = Detecting(supervised=False)
    detected.detector.said_goodbye(0)
    detected.detector.said_goodbye(1)
    detected.detector.node_lost([1], "was lost with node 1")
    detected.pass_deadlines()
    assert detected.events == []
