"""What a detector makes of what it hears, with a clock that the test turns and no sockets."""

from __future__ import annotations

import pytest

from allstep.diagnosis.hang import HangLimits
from allstep.diagnosis.rank_outcome import OutcomeKind
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


def test_an_unsupervised_node_may_go_after_its_worlds_closed() -> None:
    detected = Detecting(supervised=False)
    detected.detector.said_goodbye(0)
    detected.detector.said_goodbye(1)
    detected.detector.node_lost([1], "was lost with node 1")
    detected.pass_deadlines()
    assert detected.events == []
