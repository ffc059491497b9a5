"""What the machine that decides makes of an attempt's end, and when a run that failed is begun again."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from allstep.launch.event_loop import EventLoop
from allstep.launch.head import FailedAttempt, Progress, decide_restart, lead
from allstep.launch.settings import LaunchSettings
from allstep.launch.worker_plan import Command
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
            command=Command("train.py"),
            workers=2,
            environ={},
            nodes=None,
        )
        self.secrets: tuple[str, ...] = ()
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
            diagnosis=hub.diagnosis(),
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
def test_a_run_that_a_signal_stopped_is_preempted_only_where_no_rank_failed(
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


def attempts(*progress: Progress) -> list[FailedAttempt]:
    return [FailedAttempt(number, each, "boom") for number, each in enumerate(progress)]


@pytest.mark.parametrize(
    ("progress", "max_restarts", "stop_after", "again"),
    [
        ([None], 0, 3, False),
        ([(1, 7)], 0, 3, False),
        ([None], 1, 3, True),
        ([None, None], 1, 3, False),
        ([None] * 3, 9, 3, True),
        ([None] * 4, 9, 3, False),  # never came through init
        ([None, None, None, (0, 0), (0, 0), None], 9, 3, True),
        ([(1, 7), (1, 7), (1, 7)], 9, 3, True),
        ([(1, 7), (1, 7), (1, 7), (1, 7)], 9, 3, False),
        ([(1, 7), (1, 6), (1, 7), (1, 8)], 9, 3, True),
        ([(1, 7), (1, 6), (1, 7), (1, 8), (1, 8), (1, 1)], 9, 3, True),
        ([(1, 7), (1, 6), (1, 7), (1, 8), (1, 8), (1, 1), (0, 9)], 9, 3, False),
        ([(1, 7), (2, 1), (3, 1), (4, 1)], 9, 1, True),
        ([(1, 7), None, None, None], 9, 3, False),  # failed before its first message: no further
        ([None, None, None, (0, 0)], 9, 3, True),
        ([(0, 0), (0, 0)], 9, 1, False),
    ],
)
def test_another_attempt_needs_a_restart_left_and_progress_now_and_then(
    progress: list[Progress], max_restarts: int, stop_after: int, again: bool
) -> None:
    assert decide_restart(attempts(*progress), max_restarts=max_restarts, stop_after=stop_after).again is again


def test_the_reason_says_how_far_the_attempts_came_and_how_often() -> None:
    decision = decide_restart(attempts((2, 30), (2, 5), (1, 40)), max_restarts=9, stop_after=2)
    assert decision.reason == (
        "2 restarts in a row got no further than epoch 2, iteration 30, so another would not either"
    )
    assert decide_restart(attempts((1, 1)), max_restarts=2, stop_after=2).reason == "restart 1 of at most 2"
    decision = decide_restart(attempts(None, None, None), max_restarts=9, stop_after=2)
    assert decision.reason.startswith("2 restarts in a row ended before all ranks had come through allstep.init")
    assert "--stop-after" in decision.reason
    assert decide_restart(attempts(None, None), max_restarts=1, stop_after=2).reason == "1 restart taken"
