"""B6: strangers are bounded in number, time, bytes and per address, and no descriptor is too high."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time

import pytest

from allstep.monitor.service import AllArrived
from allstep.protocol import server as server_module
from allstep.protocol.connection import Connection, connect
from allstep.protocol.descriptors import descriptor_limit, raise_descriptor_limit, set_descriptor_limit
from allstep.protocol.messages import RankHello, Welcome, decode, encode
from allstep.testing import run_ranks
from allstep.testing.fork_server import close_server
from allstep.world import World
from tests.jobs.processes import many_open_files
from tests.monitor.driving import Caller, registration, serving, world
from tests.protocol.proving import BOUND, HOST, KEY

LIMITED = """
import resource, selectors, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from allstep.monitor.hub import Hub
from allstep.monitor.service import MonitorSettings
listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
selector = selectors.DefaultSelector()
hub = Hub(selector, listener, MonitorSettings(sys.argv[1], 0, 1))
print(listener.getsockname()[1], flush=True)
while True:
    for key, _ in selector.select(max(0.0, hub.deadline() - time.monotonic())):
        hub.ready(key)
    hub.tick()
"""


def test_row_b6_idle_connections_do_not_keep_a_rank_out_at_a_limit_of_128() -> None:
    process = subprocess.Popen([sys.executable, "-c", LIMITED, KEY], stdout=subprocess.PIPE, text=True)
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(process.kill)
        assert process.stdout is not None
        stack.enter_context(process.stdout)
        target = HOST, int(process.stdout.readline())
        for _ in range(140):
            stack.enter_context(socket.create_connection(target))
        connection = stack.enter_context(contextlib.closing(connect([target], key=KEY, within=BOUND, answer=BOUND)))
        connection.send(encode(RankHello(0, registration(0, 1))))
        deadline = time.monotonic() + BOUND
        lines: list[bytes] = []
        while not lines:
            assert time.monotonic() < deadline
            assert not connection.ended
            lines = list(connection.receive())
        assert decode(lines[0]) == Welcome()


def test_the_stranger_who_gives_way_is_of_the_address_with_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MOST_STRANGERS", 8)
    with serving(1) as hub, contextlib.ExitStack() as stack:
        quiet = stack.enter_context(
            contextlib.closing(Connection(socket.create_connection((HOST, hub.port), source_address=("127.0.0.2", 0))))
        )
        flood = [
            stack.enter_context(contextlib.closing(Connection(socket.create_connection((HOST, hub.port)))))
            for _ in range(40)
        ]
        hub.until(lambda: sum(list(each.receive()) == [] and bool(each.ended) for each in flood) >= 33)
        assert not list(quiet.receive())
        assert not quiet.ended
        with world(hub, 1):
            hub.event(AllArrived)


def test_who_does_not_introduce_itself_in_time_is_closed_on() -> None:
    with serving(1) as hub, contextlib.closing(Connection(socket.create_connection((HOST, hub.port)))) as idle:
        hub.turn()
        hub.pass_time(server_module.INTRODUCTION_S + 1)
        list(idle.receive())
        assert idle.ended


@pytest.mark.parametrize(
    "flood", [b"\n" * (1 << 20), b"x" * (1 << 20), b"x\n" * (1 << 19)], ids=["lines", "line", "short"]
)
def test_row_b6_a_mebibyte_of_anything_costs_its_sender_the_connection(flood: bytes) -> None:
    with serving(1) as hub, contextlib.closing(Connection(socket.create_connection((HOST, hub.port)))) as stranger:
        stranger.send(flood)
        hub.until(lambda: (stranger.flush(), list(stranger.receive()), stranger.ended)[2])
        with world(hub, 1):
            hub.event(AllArrived)


def test_a_line_that_comes_in_pieces_is_searched_once() -> None:
    """16,384 pieces; searched from its beginning at each, this takes minutes."""
    ours, theirs = socket.socketpair()
    with contextlib.closing(Connection(ours)) as connection, theirs:
        began = time.monotonic()
        for _ in range(1 << 14):
            theirs.sendall(b"x" * 200)
            assert list(connection.receive()) == []
        theirs.sendall(b"\n")
        assert [len(line) for line in connection.receive()] == [200 << 14]
        assert time.monotonic() - began < 20


def test_a_service_opens_what_the_system_allows_and_its_children_do_not() -> None:
    before = raise_descriptor_limit()
    try:
        assert descriptor_limit() >= min(before, 1 << 16)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        set_descriptor_limit(100, child.pid)
        assert resource.prlimit(child.pid, resource.RLIMIT_NOFILE)[0] == 100
        child.communicate(b"\n")
    finally:
        set_descriptor_limit(before, os.getpid())


def test_a_rank_of_a_process_with_many_open_files_is_served() -> None:
    with many_open_files(), serving(1) as hub:
        caller = Caller(hub, 0, 1).come()
        assert caller.connection.sock.fileno() > 1023
        assert caller.hears(Welcome) == Welcome()
        caller.close()


def rank_of(world: World) -> int:
    return world.rank


@pytest.mark.slow
def test_row_b6_ranks_start_where_descriptors_have_high_numbers() -> None:
    close_server()  # the next is started while the low numbers are in use
    try:
        with many_open_files():
            assert run_ranks(rank_of, 2) == [0, 1]
    finally:
        close_server()
