"""Measuring what is between two agents, here over loopback."""

from __future__ import annotations

import socket

import pytest

from allstep.preflight.links import LinkServer, greet, measure

KEY = "k" * 32


def test_a_link_is_measured_in_both_directions() -> None:
    server = LinkServer(KEY)
    link = measure(3, "127.0.0.1", server.port, KEY)
    assert (link.peer, link.problem) == (3, "")
    assert 0 < link.latency < 1
    assert link.sent > 1e6
    assert link.received > 1e6
    assert link.lost < 0.02
    assert link.mtu > 1000
    assert greet(3, "127.0.0.1", server.port, KEY).problem == ""


def test_who_has_another_key_measures_nothing() -> None:
    server = LinkServer(KEY)
    assert "does not have this run's key" in measure(1, "127.0.0.1", server.port, "another").problem


def test_a_port_at_which_nobody_listens_is_a_problem() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        assert "Connection refused" in measure(1, "127.0.0.1", port, KEY).problem
        assert "Connection refused" in greet(1, "127.0.0.1", port, KEY).problem


def test_what_accepts_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allstep.preflight.links.CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert measure(1, "127.0.0.1", silent.getsockname()[1], KEY).problem
