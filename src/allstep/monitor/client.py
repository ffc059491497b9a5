"""A rank's connection to its monitor: it introduces the rank, sends heartbeats and failures, and obeys orders.

`Client.connect` is called once per World, before the process group is opened. It returns when all ranks have come and
fit, and raises with the reason otherwise. `start` begins to send a heartbeat once a second from a daemon thread, which
also obeys the monitor: `Leave` writes the report (if it has one) to standard error and ends the process, `AskStacks` is
answered with the stacks of all threads. `report` says at once that an exception is on its way, before anything is torn
down. `close` says goodbye in order. No call blocks for longer than its stated bound, and a monitor that is gone or
frozen costs a rank nothing but being watched.

With each heartbeat the thread winds up `faulthandler`'s timer (`own_stacks`). A rank whose interpreter lock is held can
neither send nor answer; the timer then leaves its stacks in the file whose address its `RankHello` gave.

`leave` ends this process from any thread, whatever the main thread is in.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import sys
import threading
import time
import weakref
from dataclasses import replace
from typing import NoReturn

from allstep.errors import ChannelError, WorldError
from allstep.monitor.collective_record import record_collectives
from allstep.monitor.own_stacks import StacksTimer, own_stacks
from allstep.monitor.report_output import write_bounded
from allstep.open_files import write_buffers
from allstep.protocol.address import split_address
from allstep.protocol.connection import Connection, connect, is_ready
from allstep.protocol.foreign_text import printable
from allstep.protocol.heartbeat import RankActivity
from allstep.protocol.messages import (
    AskStacks,
    CheckpointSaved,
    Failure,
    FailureCaught,
    Goodbye,
    Heartbeat,
    Leave,
    Message,
    Notice,
    RankHello,
    Refused,
    Stacks,
    Welcome,
    decode,
    encode,
)
from allstep.protocol.server import FIRST_LINE

REPORT_S = 1.0
"""Seconds that `Client.report` and `Client.close` take at most."""

PERIOD_S = 1.0
"""Seconds between two heartbeats."""

_CONNECT_S = 10.0  # in which something must answer at the monitor's address
_ANSWER_S = 2.0  # that one attempt to connect may take
_GRACE_S = 5.0  # for the monitor's own refusal to come after the ranks' time is over
_LONGEST_TEXT = 64 << 10  # characters of a message or a traceback; its ends are what matters


class Client:
    """The connection of one rank."""

    def __init__(self, connection: Connection, hello: RankHello, timer: StacksTimer) -> None:
        self._connection = connection
        self._rank = hello.registration.rank
        self._attempt = hello.attempt
        self._timer = timer
        self._lock = threading.Lock()
        self._wake = os.pipe()
        self._closing = self._said_goodbye = False
        self._judged = threading.Event()
        self._thread: threading.Thread | None = None
        self._number = self._beats = 0
        self._activity: RankActivity | None = None
        self._early: list[bytes] = []  # what came right behind the welcome
        itself = weakref.ref(self)  # what is registered stays registered for the life of the process
        os.register_at_fork(after_in_child=lambda: _forget_in_child(itself))

    @classmethod
    def connect(cls, address: str, key: str, hello: RankHello, timeout: float) -> Client:
        """Introduce this rank, and wait until all ranks have come.

        Args:
            address: HOST:PORT of the monitor.
            key: what the monitor has to have too.
            hello: who this rank is; its `patience` and `stacks_file` are filled in here.
            timeout: seconds that the ranks have to arrive.

        Raises:
            WorldError: nothing answers there, the monitor refused this rank, the facts are too long, or ranks are
                missing or do not fit.
        """
        deadline = time.monotonic() + timeout + _GRACE_S
        timer = StacksTimer()
        hello = replace(hello, patience=timeout, stacks_file=timer.address)
        try:
            _check_length(hello)
            client = cls(_reach(address, key, timeout), hello, timer)
        except BaseException:
            timer.close()
            raise
        try:
            client._send(hello, REPORT_S)
            client._await_welcome(address, deadline, timeout)
        except BaseException:
            client._release()
            raise
        return client

    def start(self, activity: RankActivity) -> None:
        """Begin to send heartbeats, and to obey the monitor, in a daemon thread.

        Call it right after `connect`, before anything that could wait for other ranks.
        """
        self._activity = activity
        self._thread = threading.Thread(target=self._serve, args=(activity,), daemon=True, name="allstep channel")
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether the monitor is gone."""
        return bool(self._connection.ended)

    def report(self, failure: Failure) -> None:
        """Send a failure now; returns within `REPORT_S`. Its `rank`, `attempt` and `number` are filled in here."""
        self._number += 1
        sent = replace(
            failure,
            rank=self._rank,
            attempt=self._attempt,
            number=self._number,
            message=_shortened(failure.message, _LONGEST_TEXT),
            traceback=_shortened(failure.traceback, _LONGEST_TEXT),
        )
        self._send(sent, REPORT_S)

    def linger(self, timeout: float) -> None:
        """After a report, wait until the monitor has judged, and write the report of the failure if it asks for that.

        For ranks without a supervisor: their launcher ends the others as soon as this process has ended.
        """
        if self._thread is not None and self._thread.is_alive() and not self.lost:
            self._judged.wait(timeout)

    def withdraw(self) -> None:
        """Take back what was reported as only seen: the exception was caught, and the rank goes on."""
        self._send(FailureCaught(self._rank), REPORT_S)

    def tell(self, message: CheckpointSaved) -> None:
        """Say what the monitor keeps in the run's record; returns within `REPORT_S`."""
        self._send(message, REPORT_S)

    def say_goodbye(self, *, closed: bool = True, code: int = 0) -> None:
        """This World is closed in order, or (`closed` false) the interpreter ends while it is open.

        What is left to do can fail this rank no more. Heartbeats go on, so that a report can tell where it waits.
        """
        if not self._said_goodbye:
            self._said_goodbye = True
            if self._activity is not None:  # how far it came, which the last heartbeat may be a second behind
                self._send(self._heartbeat(self._activity), REPORT_S)
            self._send(Goodbye(self._rank, closed, code), REPORT_S)

    def close(self, *, closed: bool = True) -> None:
        """Say goodbye, if that was not done before, and end the connection."""
        self.say_goodbye(closed=closed)
        self._release()

    def _release(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            os.write(self._wake[1], b"x")
        if self._thread is not None:
            self._thread.join(REPORT_S)
        else:
            self._timer.close()
        # A thread that is still in a call of its own would use the descriptors that another file gets next.
        if self._thread is None or not self._thread.is_alive():
            self._connection.close()
            for fd in self._wake:
                os.close(fd)
            self._wake = (-1, -1)

    def _send(self, message: Message, patience: float) -> None:
        # The lock is the heartbeat thread's for the length of a send that does not block, so this seldom waits.
        deadline = time.monotonic() + patience
        if not self._lock.acquire(timeout=patience):
            return
        try:
            connection = self._connection
            connection.send(encode(message))
            while connection.backlog and not connection.ended and (left := deadline - time.monotonic()) > 0:
                is_ready(connection.sock.fileno(), left, writing=True)
                connection.flush()
        finally:
            self._lock.release()

    def _await_welcome(self, address: str, deadline: float, timeout: float) -> None:
        connection = self._connection
        while not connection.ended:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WorldError(
                    f"rank {self._rank}: the service at {address} did not say within {timeout + _GRACE_S:g} s whether "
                    "all ranks arrived; its process may be frozen"
                )
            is_ready(connection.sock.fileno(), left, writing=connection.backlog > 0)
            connection.flush()
            lines = list(connection.receive())
            for index, line in enumerate(lines, 1):
                match _decoded(line, address):
                    case Welcome():
                        self._early = lines[index:]
                        return
                    case Refused(reason):
                        raise WorldError(printable(reason, lines=True))
                    case Leave() as order:
                        self._obey(order)
        raise WorldError(
            f"rank {self._rank}: the service at {address} closed the connection ({connection.ended}) before all "
            "ranks had arrived; what it printed may say why"
        )

    def _serve(self, activity: RankActivity) -> None:
        beat_at = time.monotonic()
        connection = self._connection
        with contextlib.closing(self._timer) as timer, selectors.PollSelector() as selector:
            selector.register(self._wake[0], selectors.EVENT_READ)
            selector.register(connection.sock, selectors.EVENT_READ)
            # What came in the same read as the welcome; nothing would wake the selector for it.
            for line in self._early:
                self._handle(line)
            while not self._closing and not connection.ended:
                if time.monotonic() >= beat_at:
                    timer.wind_up()
                    beat_at = time.monotonic() + PERIOD_S
                    with self._lock:
                        connection.send(encode(self._heartbeat(activity)))
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.backlog else 0)
                selector.modify(connection.sock, events)
                selector.select(max(0.0, beat_at - time.monotonic()))
                with self._lock:
                    connection.flush()
                    lines = list(connection.receive())
                for line in lines:
                    self._handle(line)

    def _heartbeat(self, activity: RankActivity) -> Heartbeat:
        self._beats += 1
        return activity.heartbeat(self._rank, self._attempt, self._beats)

    def _handle(self, line: bytes) -> None:
        with contextlib.suppress(Exception):  # whatever the monitor sends, the heartbeats go on
            match decode(line):
                case Leave() as order:
                    self._obey(order)
                case Notice(text):
                    write_out(text)
                case AskStacks():
                    self._send(self._stacks(), REPORT_S)

    def _stacks(self) -> Stacks:
        """The answer to `AskStacks`; an empty one where there can be no other, so that it is not waited for."""
        try:
            text = own_stacks()
        except OSError:
            text = ""
        recorded = record_collectives(self._rank, os.environ.get("ALLSTEP_ATTEMPT_FOLDER", ""))
        return Stacks(self._rank, text, recorded.trace, recorded.groups)

    def _obey(self, order: Leave) -> None:
        if order.code is not None:
            leave(order.code, order.report)
        write_out(order.report)
        self._judged.set()


def _forget_in_child(reference: weakref.ref[Client]) -> None:
    """Close the connection in a forked child: one that outlives this rank must not keep it open."""
    client = reference()
    if client is not None and not client._closing:
        client._connection.close()


def _check_length(hello: RankHello) -> None:
    """The service closes on a longer line without a word, since a stranger could send it."""
    length, facts = len(encode(hello)) - 1, hello.registration.facts
    if length <= FIRST_LINE:
        return
    largest = max(facts, key=lambda name: len(facts[name]), default="")
    raise WorldError(
        f"rank {hello.registration.rank}: facts are too long: with them a rank's introduction has {length} bytes, "
        f"of at most {FIRST_LINE}; the longest of {len(facts)} is {largest!r}, with {len(facts.get(largest, ''))} "
        "characters. Give init a digest instead, such as hashlib.sha256(repr(config).encode()).hexdigest()"
    )


def _reach(address: str, key: str, timeout: float) -> Connection:
    within = min(timeout, _CONNECT_S)
    try:
        # A monitor that accepts may be busy with all the others, or stopped for a while.
        return connect([split_address(address)], key=key, within=within, answer=_ANSWER_S, proof=timeout + _GRACE_S)
    except ConnectionError as error:
        raise WorldError(
            f"nothing of this run answers at {address}, where its control channel should be "
            f"({error}); check that the node can be reached and that no firewall is between"
        ) from error


def _decoded(line: bytes, address: str) -> Message:
    try:
        return decode(line)
    except ChannelError as error:
        raise WorldError(f"what answers at {address} is not this run's control channel: {error}") from error


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n... ({len(text) - most} characters left out)\n{text[-most // 2 :]}"


_FLUSH_S = 0.3  # for what the script printed or wrote to files and Python has not written yet


def leave(code: int, report: str) -> NoReturn:
    """Write what was printed so far and the report, each for a bounded time, and end the process at once.

    A pending collective cannot be aborted, and no part of the interpreter's own shutdown may wait for it.
    """
    thread = threading.Thread(target=_flush, daemon=True, name="allstep leaves")
    with contextlib.suppress(RuntimeError):  # the interpreter is ending
        thread.start()
        thread.join(_FLUSH_S)
    write_out(report)
    os._exit(code)


def write_out(report: str) -> None:
    """Write a report to standard error, whatever `sys.stderr` is by now; not for ever if it is not read."""
    if report:
        write_bounded(2, report)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    write_buffers(close=False)
