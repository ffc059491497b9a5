"""Connecting, and what a connection does when the other side is late, slow or gone."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from allstep.protocol import connection as module
from allstep.protocol.connection import Connection, Connector, connect, is_ready
from allstep.protocol.name_lookup import NameLookup, resolve
from tests.protocol.proving import BOUND, HOST, KEY, answer, answering


@contextlib.contextmanager
def refusing() -> Iterator[tuple[socket.socket, tuple[str, int]]]:
    """A port that is kept from others and that nobody listens on, until the test does."""
    with socket.socket() as held:
        held.bind((HOST, 0))
        yield held, (HOST, held.getsockname()[1])


@contextlib.contextmanager
def silent() -> Iterator[tuple[str, int]]:
    """A port whose queue of connections is full, so that the system answers to no further one."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((HOST, 0))
        listener.listen(0)
        target = HOST, listener.getsockname()[1]
        while True:
            try:
                stack.enter_context(socket.create_connection(target, timeout=0.2))
            except TimeoutError:
                break
        yield target


@contextlib.contextmanager
def connecting(*targets: tuple[str, int], within: float = BOUND, **options: object) -> Iterator[Connector]:
    with contextlib.closing(Connector(targets, within=within, key=KEY, **{"answer": 1.0, **options})) as connector:
        yield connector
        if connector.connection is not None:
            connector.connection.close()


def drive(connector: Connector) -> Connector:
    """Turn until there is a connection, or there will be none."""
    until = time.monotonic() + BOUND
    while connector.connection is None and not connector.failed:
        assert time.monotonic() < until
        descriptor = None if connector.sock is None else connector.sock.fileno()
        writing = connector.events == selectors.EVENT_WRITE
        is_ready(descriptor, connector.deadline() - time.monotonic(), writing=writing)
        connector.advance()
    return connector


def wait_for(condition) -> None:
    until = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < until
        is_ready(None, 0.01)


def pair() -> tuple[Connection, socket.socket]:
    ours, theirs = socket.socketpair()
    return Connection(ours), theirs


def test_a_target_that_answers_gives_a_connection():
    with (
        answering() as (proven, target),
        contextlib.closing(connect([target], key=KEY, within=BOUND, answer=BOUND)) as ours,
    ):
        ours.send(b"hello\n")
        wait_for(lambda: proven)
        assert proven[0].recv(6) == b"hello\n"


def test_a_target_that_refuses_is_followed_by_the_next():
    with refusing() as (_, first), answering() as (_, second), connecting(first, second) as connector:
        assert drive(connector).target == second
        assert connector.problems == {first: "Connection refused"}


def test_a_target_that_is_silent_is_followed_by_the_next():
    with silent() as first, answering() as (_, second), connecting(first, second, answer=0.2, proof=BOUND) as connector:
        assert drive(connector).target == second
        assert connector.problems == {first: "it does not answer"}


def test_a_service_that_begins_to_listen_later_is_reached():
    with refusing() as (held, target):
        made: list[Connection] = []
        thread = threading.Thread(target=lambda: made.append(connect([target], key=KEY, within=BOUND, answer=BOUND)))
        thread.start()
        is_ready(None, 1.5 * module.PAUSE_S)  # until it has been refused more than once
        held.listen()
        with held.accept()[0] as theirs:
            answer(theirs)
        thread.join(BOUND)
        assert made
        made[0].close()


def test_a_name_that_begins_to_resolve_later_is_reached(monkeypatch):
    asked: list[str] = []

    def addresses(host: str, port: int) -> list:
        asked.append(host)
        if len(asked) == 1:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(HOST, port)

    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    with answering() as (_, (_, port)), connecting(("head", port), addresses=addresses) as connector:
        assert drive(connector).problems == {("head", port): "Name or service not known"}
        assert asked == ["head", "head"]


def test_a_name_server_that_does_not_answer_holds_nothing_up():
    answers = threading.Event()

    def lookup(host: str, port: int) -> list:
        answers.wait(BOUND)
        return resolve(HOST, port)

    with answering() as (_, (_, port)), connecting(("head", port), addresses=NameLookup(lookup)) as connector:
        begun = time.monotonic()
        for _ in range(3):
            connector.advance()
            is_ready(None, connector.deadline() - time.monotonic())
        assert time.monotonic() - begun < BOUND / 2
        assert connector.problems == {("head", port): "its name server does not answer"}
        answers.set()
        assert drive(connector).connection is not None


def test_a_target_behind_one_whose_name_server_is_silent_is_reached():
    answers = threading.Event()

    def lookup(host: str, port: int) -> list:
        answers.wait(BOUND)
        return []

    with (
        answering() as (_, target),
        connecting(("head", 1), target, addresses=NameLookup(lookup), answer=0.3) as connector,
    ):
        assert drive(connector).target == target
        answers.set()


def test_numbers_are_looked_up_nowhere():
    def lookup(host: str, port: int) -> list:
        raise AssertionError(host)

    assert NameLookup(lookup)("127.0.0.1", 7) == [(socket.AF_INET, ("127.0.0.1", 7))]
    assert NameLookup(lookup)("::1", 7)


def test_a_name_that_cannot_be_one_is_an_error_in_words():
    look = NameLookup()

    def found() -> object:
        while (addresses := look("a" * 70 + ".example", 7)) is None:
            pass
        return addresses

    with pytest.raises(OSError, match="no name of a host"):
        found()


def test_without_an_answer_in_time_the_reason_is_told():
    with refusing() as (_, target), pytest.raises(ConnectionError, match="Connection refused"):
        connect([target], key=KEY, within=0.3, answer=1.0)
    with silent() as target, pytest.raises(ConnectionError, match="it does not answer"):
        connect([target], key=KEY, within=0.1, answer=1.0)


def test_without_retry_each_target_is_tried_once():
    with refusing() as (_, first), refusing() as (_, second), connecting(first, second, retry=False) as connector:
        begun = time.monotonic()
        assert drive(connector).failed == "Connection refused"
        assert set(connector.problems) == {first, second}
        assert time.monotonic() - begun < BOUND / 2


def test_a_connection_that_is_rejected_is_closed_and_the_next_is_tried():
    with (
        answering() as (proven, first),
        answering() as (_, second),
        connecting(first, second, proof=BOUND) as connector,
    ):
        drive(connector)
        wait_for(lambda: proven)
        connector.reject("another run's")
        assert proven[0].recv(1) == b""
        assert drive(connector).target == second
        assert connector.problems == {first: "another run's"}


@pytest.mark.parametrize("closes", [1, 2])
def test_who_is_closed_on_when_its_time_is_over_may_try_once_more(closes: int) -> None:
    with (
        socket.create_server((HOST, 0)) as service,
        connecting(service.getsockname(), within=1.0, proof=BOUND) as connector,
    ):

        def serve() -> None:
            for _ in range(closes):  # it did not hear in time who this is
                accepted = service.accept()[0]
                time.sleep(1.1)
                accepted.close()
            if closes == 1:
                answer(service.accept()[0])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        drive(connector)
        thread.join(BOUND)
    assert bool(connector.failed) == (closes == 2)


def test_the_time_to_give_up_may_be_moved():
    with refusing() as (_, target), connecting(target, within=BOUND) as connector:
        connector.until = time.monotonic()
        assert drive(connector).failed == "Connection refused"


def test_a_line_is_given_once_it_is_whole():
    ours, theirs = pair()
    with contextlib.closing(ours), theirs:
        theirs.sendall(b"one\ntw")
        assert list(ours.receive()) == [b"one"]
        theirs.sendall(b"o\n")
        assert list(ours.receive()) == [b"two"]


def test_a_line_that_is_too_long_ends_the_connection():
    ours, theirs = pair()
    ours.longest = 10
    with contextlib.closing(ours), theirs:
        theirs.sendall(b"x" * 11)
        assert list(ours.receive()) == []
        assert ours.ended == "it sent a line of more than 10 bytes"


def test_what_was_sent_before_the_other_side_closed_is_still_given():
    ours, theirs = pair()
    with contextlib.closing(ours):
        theirs.sendall(b"last\n")
        theirs.close()
        assert list(ours.receive()) == [b"last"]
        assert list(ours.receive()) == []
        assert ours.ended == "closed by the other side"


def test_a_peer_that_does_not_read_is_let_go(monkeypatch):
    monkeypatch.setattr(module, "LARGEST_BACKLOG", 1 << 16)
    ours, theirs = pair()
    with contextlib.closing(ours), theirs:
        while not ours.ended:
            ours.send(b"x" * (1 << 16))
        assert "the other side does not read" in ours.ended


def test_what_waits_is_sent_when_there_is_room():
    ours, theirs = pair()
    with contextlib.closing(ours), theirs:
        while not ours.backlog:
            ours.send(b"x" * (1 << 16))
        while ours.backlog:
            assert theirs.recv(1 << 20)
            ours.flush()
        assert not ours.ended
