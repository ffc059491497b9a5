"""A hub that the test itself drives, and ranks: plain sockets that say what the test has them say, or processes."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from allstep.diagnosis.hang import HangLimits
from allstep.monitor.hub import Hub
from allstep.monitor.service import MonitorEvent, MonitorSettings, Verdict
from allstep.protocol.connection import Connection, is_ready
from allstep.protocol.messages import CheckpointSaved, Failure, Heartbeat, Message, RankHello, decode, encode
from allstep.protocol.registration import RankRegistration
from tests.protocol.proving import KEY, prove

RANK = Path(__file__).with_name("rank_process.py")
BOUND = 30.0  # seconds that anything in these tests may take on a loaded machine
NEWS_S = 0.001  # in which what was said over a socket of this machine has come


def listening() -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    sock.listen(512)
    return sock


def registration(rank: int, world_size: int = 2, **other: Any) -> RankRegistration:
    return RankRegistration(
        **{"host": "a", "pid": 100 + rank, "device_type": "cpu", "backend": "gloo", **other},
        rank=rank,
        world_size=world_size,
    )


class Clock:
    """Seconds that pass where the test lets them, whatever the machine does meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Driven:
    """A service, its selector, and all its events so far.

    Args:
        make: makes the service.
        clock: its clock. By a `Clock`, time passes while nobody has said anything.
    """

    def __init__(
        self,
        make: Callable[[selectors.BaseSelector, socket.socket, Callable[[], float]], Any],
        clock: Callable[[], float],
    ) -> None:
        self.clock = clock
        self.selector = selectors.DefaultSelector()
        listener = listening()
        self.port = listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.service = make(self.selector, listener, clock)
        self.events: list[MonitorEvent] = []
        self.others: list[Driven] = []

    def turn(self, seconds: float = 0.02) -> None:
        until = max(self.clock(), min(self.clock() + seconds, self.service.deadline()))
        said = self.selector.select(NEWS_S if isinstance(self.clock, Clock) else until - self.clock())
        for key, _ in said:
            self.service.ready(key)
        if isinstance(self.clock, Clock) and not said:
            self.clock.now = until
        if self.clock() >= self.service.deadline():
            self.service.tick()
        self.events += self.service.take()
        for other in self.others:
            other.turn(0.0)

    def until(self, condition: Callable[[], Any], seconds: float = BOUND) -> Any:
        deadline = time.monotonic() + seconds
        while not (met := condition()):
            assert time.monotonic() < deadline, f"not within {seconds} s; events: {self.events}"
            self.turn()
        return met

    def pass_time(self, seconds: float) -> None:
        deadline = self.clock() + seconds
        while self.clock() < deadline:
            self.turn()

    def event(self, kind: type[Any]) -> Any:
        return self.until(lambda: next((each for each in self.events if isinstance(each, kind)), None))

    def verdict(self) -> Any:
        return self.event(Verdict).diagnosis

    def close(self) -> None:
        self.service.close()
        self.selector.close()


@contextlib.contextmanager
def serving(
    world_size: int = 2,
    *,
    limits: str = "",
    supervised: bool = True,
    key: str = KEY,
    attempt: int = 0,
    clock: Callable[[], float] | None = None,
    saved: Callable[[CheckpointSaved], None] | None = None,
) -> Iterator[Driven]:
    """A hub; its clock is one that the test lets pass, unless another is given."""
    settings = MonitorSettings(key, attempt, world_size, HangLimits.parse(limits), supervised, saved=saved)
    driven = Driven(
        lambda selector, listener, clock: Hub(selector, listener, settings, clock=clock),
        clock or Clock(),
    )
    for node in (1, 2):
        driven.service.expect_node(node)
    with contextlib.closing(driven):
        yield driven


class Caller:
    """A rank as far as the service can see: it says what it is told to, and collects what it hears."""

    def __init__(self, driven: Driven, rank: int = 0, world_size: int = 2, key: str = KEY, **hello: Any) -> None:
        self.connection = Connection(socket.create_connection(("127.0.0.1", driven.port), timeout=5))
        self.driven = driven
        self.rank = rank
        self.heard: list[Message] = []
        self.number = 0
        self.registration = hello.pop("registration", None) or registration(rank, world_size)
        self.hello = RankHello(**{"attempt": 0, "registration": self.registration, **hello})
        self.key = key

    def say(self, message: Message) -> None:
        self.connection.send(encode(message))

    def come(self, hello: Message | None = None) -> Caller:
        """Prove that it has the key, and introduce itself."""
        prove(self.connection, self.driven.port, self._turn, self.key)
        self.say(hello or self.hello)
        return self

    def _turn(self) -> None:
        if isinstance(self.driven, Driven):
            self.driven.turn(0.0)
        else:  # another process serves
            is_ready(self.connection.sock.fileno(), BOUND)

    def beat(self, **values: Any) -> None:
        self.number += 1
        given = {"epoch": 1, "iteration": 1, "section": "step", "seconds": 0.0, **values}
        self.say(Heartbeat(rank=self.rank, attempt=0, number=self.number, **given))

    def fail(self, kind: str = "ValueError", message: str = "bad batch", *, derived: bool = False) -> None:
        text = f"Traceback (most recent call last):\n{kind}: {message}\n"
        self.say(Failure(self.rank, 0, 1, kind, message, text, 1, 7, "step", derived))

    def listen(self) -> list[Message]:
        self.heard += [decode(line) for line in self.connection.receive()]
        return self.heard

    def hears(self, kind: type[Any]) -> Any:
        return self.driven.until(lambda: next((each for each in self.listen() if isinstance(each, kind)), None))

    def hears_no_more(self) -> str:
        return str(self.driven.until(lambda: self.listen() is not None and self.connection.ended))

    def close(self) -> None:
        self.connection.close()


@contextlib.contextmanager
def world(driven: Driven, world_size: int = 2, **hello: Any) -> Iterator[list[Caller]]:
    """Ranks that have been welcomed."""
    from allstep.protocol.messages import Welcome

    callers = [Caller(driven, rank, world_size, **hello).come() for rank in range(world_size)]
    try:
        for caller in callers:
            caller.hears(Welcome)
        yield callers
    finally:
        for caller in callers:
            caller.close()


class RankProcess:
    """A process with a real `Client`; see rank_process.py for what it can be told to do."""

    def __init__(self, address: str, rank: int, world_size: int, *what: str, key: str = KEY, node: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(RANK), address, key, str(rank), str(world_size), *what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NODE": str(node)},
        )
        self.rank = rank

    def ended(self) -> bool:
        return self.process.poll() is not None

    def errors(self) -> str:
        return self.process.communicate(timeout=BOUND)[1]

    def end(self) -> None:
        if not self.ended():
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        with contextlib.suppress(ValueError):
            self.process.communicate(timeout=BOUND)


@contextlib.contextmanager
def rank_processes(address: str, *behaviours: tuple[str, ...], key: str = KEY) -> Iterator[list[RankProcess]]:
    ranks = [RankProcess(address, rank, len(behaviours), *what, key=key) for rank, what in enumerate(behaviours)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.end()


def wait_for(condition: Callable[[], Any], seconds: float = BOUND) -> Any:
    deadline = time.monotonic() + seconds
    while not (met := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)  # any condition, so it is asked again
    return met


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True
