"""A service that a thread of the test drives, for ranks that a test starts itself.

As a supervisor would, it orders the ranks to leave when there is a verdict.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterator

from allstep.diagnosis.hang import HangLimits
from allstep.exit_codes import PEER_LOST
from allstep.monitor.hub import Hub
from allstep.monitor.service import MonitorEvent, MonitorSettings, Verdict
from allstep.protocol.messages import Heartbeat

KEY = "5ec4e7"


class Served:
    """The hub of a world. `env` is for its ranks, `events` what happened, `beats` every heartbeat that was seen."""

    def __init__(self, world_size: int, limits: str = "") -> None:
        self.events: list[MonitorEvent] = []
        self.beats: dict[int, dict[int, Heartbeat]] = {rank: {} for rank in range(world_size)}
        self._selector = selectors.DefaultSelector()
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        self.env = {"ALLSTEP_CHANNEL": f"127.0.0.1:{port}", "ALLSTEP_KEY": KEY}
        settings = MonitorSettings(KEY, 0, world_size, HangLimits.parse(limits))
        self._hub = Hub(self._selector, listener, settings)
        self._over = False
        self._thread = threading.Thread(target=self._drive, daemon=True)
        self._thread.start()

    @property
    def verdict(self) -> Verdict | None:
        """The verdict, if there is one."""
        return next((event for event in self.events if isinstance(event, Verdict)), None)

    def close(self) -> None:
        """Serve no longer."""
        self._over = True
        self._thread.join(10)

    def _drive(self) -> None:
        hub = self._hub
        while not self._over:
            left = (hub.deadline() or time.monotonic()) - time.monotonic()
            for key, _ in self._selector.select(min(max(left, 0.0), 0.05)):
                hub.ready(key)
            if time.monotonic() >= (hub.deadline() or 0.0):
                hub.tick()
            happened = hub.take()
            if any(isinstance(event, Verdict) for event in happened):
                hub.order_leave("the run has failed", PEER_LOST)
            self.events += happened
            for rank, seen in self.beats.items():
                beat = hub.status(rank)
                if beat is not None:
                    seen[beat.number] = beat
        hub.close()
        self._selector.close()


@contextlib.contextmanager
def serving(world_size: int = 2, limits: str = "") -> Iterator[Served]:
    """A service for as long as the block lasts."""
    with contextlib.closing(Served(world_size, limits)) as served:
        yield served
