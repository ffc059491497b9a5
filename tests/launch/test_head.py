"""What the machine that decides makes of an attempt's end, with ends and signals that the test says."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from allstep.launch.event_loop import EventLoop
from allstep.launch.head import lead
from allstep.launch.settings import LaunchSettings
from allstep.monitor.hub import Hub
from allstep.protocol.worker_exit import WorkerExit


class Leader:
    """A machine of two workers whose only attempt ends as the test says."""

    def __init__(
        self,
        folder: Path,
        ends: Sequence[WorkerExit],
        *,
        attempt: signal.Signals | None,
        machine: signal.Signals | None,
    ) -> None:
        self.launch = SimpleNamespace(
            settings=LaunchSettings(runs=str(folder), name="exp", max_restarts=3),
            name="exp",
            workers=2,
            environ={},
            nodes=None,
        )
        self.loop = EventLoop()
        self.said: list[str] = []
        self.stopped_by: signal.Signals | None = None
        self._ends = ends
        self._attempt_stopped_by = attempt
        self._machine_stopped_by = machine

    def say(self, text: str) -> None:
        self.said.append(text)

    def stopped(self) -> bool:
        return self.stopped_by is not None

    def attempt(self, share: object, hub: Hub, folder: object) -> object:
        for end in self._ends:
            hub.worker_ended(end)
        self.stopped_by = self._machine_stopped_by
        return SimpleNamespace(
            case=hub.case(),
            stopped_by=self._attempt_stopped_by,
            ends={end.rank: end for end in self._ends},
            killed=lambda: (),
            streams=SimpleNamespace(last_output=lambda rank: ""),
        )

    def lead(self) -> int:
        machine: Any = self
        return lead(machine)


@pytest.mark.parametrize(
    ("codes", "status"), [((85, 85), 85), ((85, 1), 143), ((1, 85), 143), ((85, -signal.SIGSEGV), 143), ((0, 0), 143)]
)
def test_a_run_that_a_signal_stopped_made_room_only_where_no_rank_failed(
    codes: tuple[int, int], status: int, tmp_path: Path
) -> None:
    ends = [WorkerExit(rank, code) for rank, code in enumerate(codes)]
    leader = Leader(tmp_path, ends, attempt=signal.SIGTERM, machine=signal.SIGTERM)
    assert leader.lead() == status
    assert leader.said == ["stopped by SIGTERM"]


def test_a_signal_after_the_verdict_is_no_reason_to_hold_back_the_report(tmp_path: Path) -> None:
    ends = [WorkerExit(0, 84), WorkerExit(1, 3, stderr="no such file\n")]
    leader = Leader(tmp_path, ends, attempt=None, machine=signal.SIGTERM)
    assert leader.lead() == 3
    report, last = leader.said
    assert "rank 1 of 2 failed first" in report
    assert last == "not begun again: stopped by SIGTERM"
    assert (tmp_path / "exp/attempt_0/failure.json").exists()
