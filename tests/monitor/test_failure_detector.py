"""What an inquiry makes of what it hears, with a clock that the test turns and no sockets."""

from __future__ import annotations

import pytest

from allstep.diagnosis.hang import Limits
from allstep.diagnosis.rank_outcome import Kind
from allstep.monitor.failure_detector import FailureDetector
from allstep.monitor.service import HubEvent, Verdict
from allstep.protocol.worker_exit import WorkerExit
from tests.monitor.driving import arrival


class Inquired:
    """An inquiry about two ranks whose Worlds are open."""

    def __init__(self, *, supervised: bool) -> None:
        self.now = 100.0
        self.events: list[HubEvent] = []
        self.inquiry = FailureDetector(
            2,
            attempt=0,
            supervised=supervised,
            limits=Limits(),
            clock=lambda: self.now,
            events=self.events,
            ask_stacks=lambda: None,
        )
        for rank in range(2):
            self.inquiry.came(arrival(rank), "")

    def pass_deadlines(self) -> None:
        """Turn the clock to each deadline, until there is none."""
        while (at := self.inquiry.deadline()) is not None:
            self.now = max(self.now, at)
            self.inquiry.tick()


@pytest.mark.parametrize("first", ["the end", "the loss"])
def test_a_node_lost_after_its_ranks_closed_their_worlds_is_the_cause_where_their_ends_were_to_be_told(
    first: str,
) -> None:
    inquired = Inquired(supervised=True)
    inquiry = inquired.inquiry
    inquiry.said_goodbye(0)
    inquiry.said_goodbye(1)
    inquired.pass_deadlines()
    assert inquired.events == []
    if first == "the end":
        inquiry.ended(WorkerExit(0, 0))
    inquiry.node_lost([1], "was lost with node 1")
    if first == "the loss":
        inquiry.ended(WorkerExit(0, 0))
    inquired.pass_deadlines()
    (verdict,) = inquired.events
    assert isinstance(verdict, Verdict)
    cause = verdict.case.cause
    assert (cause.rank, cause.kind, cause.what, verdict.case.exit_code) == (
        1,
        Kind.NODE_LOST,
        "was lost with node 1",
        84,
    )


def test_a_node_whose_ranks_closed_their_worlds_may_go_where_nobody_tells_how_they_end() -> None:
    inquired = Inquired(supervised=False)
    inquired.inquiry.said_goodbye(0)
    inquired.inquiry.said_goodbye(1)
    inquired.inquiry.node_lost([1], "was lost with node 1")
    inquired.pass_deadlines()
    assert inquired.events == []
