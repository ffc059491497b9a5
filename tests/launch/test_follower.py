"""How a machine that another one leads ends, with the other machine's words and the workers being the test's."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from allstep.launch import follower as follower_module
from allstep.launch.event_loop import EventLoop
from allstep.launch.settings import LaunchSettings
from allstep.launch.topology import Nodes
from allstep.launch.worker_plan import Command
from allstep.protocol.messages import AttemptStart, Finish, NodeResigned, RunOver

LAST = Finish("run exp was preempted (exit code 85) on all nodes", 85)
NEXT = Finish("", 0)


class Follower:
    """A machine whose attempt ends as the test says."""

    def __init__(self, folder: Path, *, finished: Finish | None, stopped: str) -> None:
        self.launch = SimpleNamespace(
            settings=LaunchSettings(runs=str(folder), name="exp"),
            command=Command("train.py"),
            workers=1,
            environ={"ALLSTEP_SECRET": "0123456789abcdef"},
            nodes=Nodes(count=2, rank=1, host="127.0.0.1", ports=(9,)),
        )
        self.loop = EventLoop()
        self.said: list[str] = []
        self.stopped_by: signal.Signals | None = None
        self.resigned: list[NodeResigned] = []
        self._finished = finished
        self._stopped = stopped

    def say(self, text: str) -> None:
        self.said.append(text)

    def stopped(self) -> bool:
        return self.stopped_by is not None

    def attempt(self, share: object, relay: object, folder: object, *, relayed: bool) -> object:
        if self._stopped == "in the attempt":
            self.stopped_by = signal.SIGTERM
        return SimpleNamespace(diagnosis=None, finished=self._finished)

    def follow(self, monkeypatch: pytest.MonkeyPatch) -> int:
        starts = [AttemptStart("exp", 0, "salt", 9, 9, 1, 2, 0)]

        def join(*given: object) -> AttemptStart | RunOver | None:
            if starts:
                return starts.pop()
            if self._stopped == "after it":
                self.stopped_by = signal.SIGTERM
            return None if self.stopped() else RunOver(85, LAST.text)

        monkeypatch.setattr(follower_module, "join", join)
        monkeypatch.setattr(follower_module, "resign", lambda nodes, key, message: self.resigned.append(message))
        machine: Any = self
        return follower_module.follow(machine)


@pytest.mark.parametrize(
    ("finished", "stopped", "status", "said"),
    [
        (LAST, "never", 85, LAST.text),
        (LAST, "in the attempt", 85, LAST.text),
        (LAST, "after it", 85, LAST.text),
        (NEXT, "in the attempt", 143, "stopped by SIGTERM"),
        (None, "in the attempt", 143, "stopped by SIGTERM"),
    ],
)
def test_a_stopped_machine_ends_as_the_run_did_where_it_heard_how(
    finished: Finish | None, stopped: str, status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = Follower(tmp_path, finished=finished, stopped=stopped)
    assert follower.follow(monkeypatch) == status
    assert follower.said == [said]
    assert [message.node_rank for message in follower.resigned] == ([] if stopped == "never" else [1])
