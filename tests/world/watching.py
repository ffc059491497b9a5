"""A World of one that is watched, with a client that only notes what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from allstep.placement import Placement
from allstep.protocol.heartbeat import RankActivity
from allstep.protocol.messages import Failure
from allstep.world import World
from allstep.world.failures import Reporter
from allstep.world.lifetime import make_current
from allstep.world.monitor_link import MonitorService


class NotingClient:
    """Stands for the channel's client: what is at stake is what a rank says and when, not how it travels."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def report(self, failure: Failure) -> None:
        self.said.append(failure)

    def withdraw(self) -> None:
        self.said.append("withdraw")

    def linger(self, timeout: float) -> None:
        self.said.append("linger")

    def close(self, *, closed: bool = True) -> None:
        self.said.append("bye" if closed else "left open")


class NotingActivity(RankActivity):
    """A activity that keeps every section entered, and how many steps began."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[str] = []
        self.begun = 0

    def enter(self, section: str) -> None:
        self.entered.append(section)
        super().enter(section)

    def step_begins(self, epoch: int, iteration: int) -> None:
        self.entered.append("step")
        self.begun += 1
        super().step_begins(epoch, iteration)


@contextmanager
def watched_world(supervised: bool = True) -> Iterator[tuple[World, NotingClient, NotingActivity]]:
    """A current World of one with such a client; closed afterwards."""
    client, activity = NotingClient(), NotingActivity()
    reporter = Reporter(client, MonitorService("", "", supervised), activity, 0, 3, "cpu")  # type: ignore[arg-type]
    reporter.install()
    world = World(Placement("alone"), torch.device("cpu"), None, 60.0, activity, reporter)
    make_current(world)
    try:
        yield world, client, activity
    finally:
        world.close()
