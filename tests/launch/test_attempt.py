"""An attempt's decisions over time, with workers, a service and a clock that are the test's."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from allstep.diagnosis.rank_outcome import OutcomeKind, RankOutcome
from allstep.diagnosis.root_cause import Diagnosis
from allstep.launch import attempt as module
from allstep.launch import workers as workers_module
from allstep.launch.attempt import KILLED, LEAVE, REMOTE, Attempt
from allstep.monitor.service import AllEnded, MonitorEvent, Verdict
from allstep.protocol.worker_exit import WorkerExit

GRACE = 15.0


class Stage:
    """The clock, the loop, the service and the terminal of one attempt."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.script: list[tuple[float, Callable[[], object]]] = []
        self.watched: dict[int, Callable[[], object]] = {}
        self.events: list[MonitorEvent] = []
        self.told: list[WorkerExit] = []
        self.orders: list[int] = []
        self.said: list[str] = []

    def at(self, seconds: float, call: Callable[[], object]) -> None:
        """Have something happen so many seconds after the beginning."""
        self.script.append((1000.0 + seconds, call))
        self.script.sort(key=lambda each: each[0])

    @property
    def passed(self) -> float:
        return self.now - 1000.0

    # the loop
    def watch(self, fd: int, call: Callable[[], object], events: int = 0) -> None:
        self.watched[fd] = call

    def forget(self, fd: int) -> None:
        self.watched.pop(fd, None)

    def turn(self, until: float | None) -> None:
        if self.script and (until is None or self.script[0][0] <= until):
            self.now, call = max(self.now, self.script[0][0]), self.script.pop(0)[1]
            call()
            return
        assert until is not None, "waits without bound"
        assert until > self.now, "does not wait at all"
        self.now = until

    # the service
    def deadline(self) -> None:
        return None

    def take(self) -> list[MonitorEvent]:
        events, self.events = self.events, []
        return events

    def worker_ended(self, end: WorkerExit) -> None:
        self.told.append(end)

    def order_leave(self, reason: str, code: int) -> None:
        self.orders.append(code)


class Worker:
    """A worker that does only what the test has it do."""

    def __init__(self, stage: Stage, rank: int) -> None:
        self.stage = stage
        self.rank = rank
        self.child = SimpleNamespace(pid=4000 + rank)
        self.exit_fd = 9000 + rank
        self.code = 0
        self.sent: list[signal.Signals] = []
        self.kills: list[float] = []
        self.on_kill: Callable[[], object] = lambda: self.end(-signal.SIGKILL)
        self.released: list[float] = []

    def end(self, code: int) -> None:
        self.code = code
        if self.exit_fd in self.stage.watched:
            self.stage.watched[self.exit_fd]()

    def send(self, number: signal.Signals) -> None:
        self.sent.append(number)

    def kill_group(self) -> None:
        if not self.kills:
            self.stage.at(self.stage.passed, self.on_kill)
        self.kills.append(self.stage.passed)

    def returncode(self) -> int:
        return self.code

    def release(self, patience: float) -> None:
        self.released.append(patience)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    for each in (module, workers_module):
        monkeypatch.setattr(each, "time", SimpleNamespace(monotonic=lambda: stage.now))
    return stage


def begin(stage: Stage, monkeypatch: pytest.MonkeyPatch, workers: int = 1) -> tuple[Attempt, list[Worker]]:
    made = [Worker(stage, rank) for rank in range(workers)]
    monkeypatch.setattr(workers_module, "start_worker", lambda plan, pipes: made[plan.rank])
    loop: Any = stage
    terminal: Any = SimpleNamespace(
        say=stage.said.append, adjust=lambda: None, outputs={}, coloured=frozenset(), congested=False
    )
    plans: Any = [SimpleNamespace(rank=rank, world_size=2) for rank in range(workers)]
    attempt = Attempt(
        plans, loop, loop=loop, terminal=terminal, folder=None, shown=frozenset(), grace=GRACE, relayed=False
    )
    attempt.start()
    return attempt, made


def test_a_signal_bounds_the_wait_for_other_machines_where_no_worker_is_left(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, (worker,) = begin(stage, monkeypatch)
    stage.at(1, lambda: worker.end(0))
    stage.at(100, lambda: attempt.handle_signal(signal.SIGTERM))
    attempt.run()
    assert attempt.stopped_by is signal.SIGTERM
    assert 100 + GRACE + REMOTE <= stage.passed < 102 + GRACE + REMOTE
    assert "no worker is left here; the other machines have 25 s to end" in stage.said[0]


def test_a_second_signal_ends_the_wait_for_other_machines(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt, (worker,) = begin(stage, monkeypatch)
    stage.at(1, lambda: worker.end(0))
    stage.at(100, lambda: attempt.handle_signal(signal.SIGINT))
    stage.at(101, lambda: attempt.handle_signal(signal.SIGINT))
    attempt.run()
    assert stage.passed < 103


def test_the_wait_ends_before_where_the_other_machines_have_ended(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, (worker,) = begin(stage, monkeypatch)
    stage.at(1, lambda: worker.end(0))
    stage.at(2, lambda: attempt.handle_signal(signal.SIGTERM))
    stage.at(4, lambda: stage.events.append(AllEnded()))
    attempt.run()
    assert stage.passed < 6


def test_workers_that_do_not_leave_after_a_signal_are_killed_after_the_grace(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, (worker,) = begin(stage, monkeypatch)
    stage.at(1, lambda: attempt.handle_signal(signal.SIGTERM))
    stage.at(1 + GRACE + 1, lambda: stage.events.append(AllEnded()))
    attempt.run()
    assert worker.sent == [signal.SIGTERM, signal.SIGCONT]
    assert worker.kills[0] == 1 + GRACE
    assert attempt.killed() == (0,)


def never() -> None:
    """What SIGKILL does to a process in which the kernel waits."""


def test_a_worker_that_cannot_be_killed_is_left_behind_and_said_to_be(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, (failed, stuck) = begin(stage, monkeypatch, 2)
    stuck.on_kill = never
    cause = RankOutcome(0, OutcomeKind.EXIT, "exit code 3", 3)
    stage.at(1, lambda: failed.end(3))
    stage.at(2, lambda: stage.events.append(Verdict(Diagnosis(cause, (), 2, 0))))
    stage.at(2 + LEAVE + KILLED + 0.5, lambda: stage.events.append(AllEnded()))
    attempt.run()
    attempt.close()
    assert stage.told[1:] == [WorkerExit(1, -signal.SIGKILL, killed=True, note="its process does not end")]
    assert stage.said == ["rank 1 was killed, and its process (pid 4001) does not end; going on without it"]
    assert stuck.kills[0] == 2 + LEAVE
    assert stage.passed < 2 + LEAVE + KILLED + 3
    assert stuck.released == [0.0]
    assert failed.released == [KILLED]


def test_workers_that_an_attempt_leaves_running_share_the_time_to_end(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, workers = begin(stage, monkeypatch, 2)
    workers[0].release = lambda patience: setattr(stage, "now", stage.now + 4)  # type: ignore[method-assign]
    attempt.close()
    assert all(worker.kills for worker in workers)
    assert workers[1].released == [KILLED - 4]
