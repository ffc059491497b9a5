"""B4: who may speak for a node, and which process may be killed for a rank."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from allstep.monitor.peer_process import holds_other_end
from allstep.monitor.service import Verdict
from allstep.placement import Placement, Rendezvous
from allstep.protocol.messages import NodeHello, Refused
from allstep.world.monitor_link import rank_secret
from tests.monitor.driving import Caller, serving, world


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        (NodeHello(0, 5, "x", (1,)), "node 5 (x) is not waited for"),
        (NodeHello(0, 0, "x", (0,)), "node 0 (x) is not waited for"),
        (NodeHello(0, 2, "x", (0, 1)), "node 2 (x) says it has ranks 0-1, and it has 1"),
        (NodeHello(0, 1, "x", ()), "says it has ranks , which it cannot have"),
        (NodeHello(0, 1, "x", (7,)), "says it has ranks 7, which it cannot have"),
        (NodeHello(0, 1, "x", (-1,)), "which it cannot have"),
    ],
)
def test_row_b4_a_node_that_nobody_expects_is_refused_and_ends_nothing(hello: NodeHello, words: str) -> None:
    with serving(2, clock=None) as hub:
        hub.service.expect_node(2, [1])
        with world(hub, 2):
            node = Caller(hub).come(hello)
            assert words in node.hears(Refused).reason
            node.close()
            hub.pass_time(5.0)
            assert not [event for event in hub.events if isinstance(event, Verdict)]


def test_a_second_process_for_a_node_is_refused() -> None:
    with serving(3) as hub:
        first = Caller(hub).come(NodeHello(0, 1, "h1", (1,)))
        hub.until(lambda: hub.service.connected == 1)
        for hello in (NodeHello(0, 1, "x", (1,)), NodeHello(0, 2, "x", (1, 2))):
            second = Caller(hub).come(hello)
            assert second.hears(Refused)
            second.close()
        assert hub.service.connected == 1
        first.close()


def test_without_the_key_no_node_is_heard() -> None:
    with serving(2) as hub, world(hub, 2):
        stranger = Caller(hub)
        stranger.say(NodeHello(0, 1, "x", (0, 1)))
        stranger.hears_no_more()
        hub.pass_time(5.0)
        assert not [event for event in hub.events if isinstance(event, Verdict)]


@contextlib.contextmanager
def pair(family: socket.AddressFamily, *, dual: bool = False) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection of this machine; of the listening side, and of the other."""
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    if dual:
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listener = socket.create_server((host, 0), family=family)
    with listener, socket.create_connection((host, listener.getsockname()[1])) as theirs:
        ours, _ = listener.accept()
        with ours:
            yield ours, theirs


CASES = [(socket.AF_INET, False), (socket.AF_INET, True), (socket.AF_INET6, False)]


@pytest.mark.skipif(not os.path.exists("/proc/self/net/tcp"), reason="needs Linux")
@pytest.mark.parametrize(("family", "dual"), CASES, ids=["IPv4", "IPv4 at both", "IPv6"])
def test_row_b4_the_kernel_says_which_process_holds_a_connection(family: socket.AddressFamily, dual: bool) -> None:
    if (dual or family == socket.AF_INET6) and not socket.has_dualstack_ipv6():
        pytest.skip("the machine has no IPv6")
    with pair(family, dual=dual) as (ours, theirs):
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        try:
            assert holds_other_end(os.getpid(), ours)
            assert not holds_other_end(other.pid, ours)
            assert not holds_other_end(0, ours)
            assert not holds_other_end(1 << 40, ours)
        finally:
            other.communicate(b"\n")
        theirs.close()
        assert not holds_other_end(os.getpid(), ours)


# The secret of ranks that no supervisor started.


def at(launcher: str, nodes: int) -> Placement:
    place = Rendezvous("h0", (1,))
    return Placement(launcher, world_size=2, nodes=nodes, local_world_size=2 // nodes, rendezvous=place)


SECRET = "0123456789abcdef"


@pytest.mark.parametrize(
    ("launcher", "nodes", "drawn"),
    [("torchrun", 1, True), ("slurm", 2, True), ("torchrun", 2, False), ("by hand", 2, False)],
)
def test_row_b4_ranks_have_a_secret_where_they_share_a_home(
    launcher: str, nodes: int, drawn: bool, tmp_path: object
) -> None:
    home = {"HOME": str(tmp_path)}
    assert bool(rank_secret(at(launcher, nodes), home)) is drawn
    assert rank_secret(at(launcher, nodes), {**home, "ALLSTEP_SECRET": SECRET}) == SECRET


def test_under_allstep_run_the_attempts_key_is_the_ranks_secret(tmp_path: object) -> None:
    environ = {"HOME": str(tmp_path), "ALLSTEP_SECRET": SECRET, "ALLSTEP_KEY": "k"}
    assert rank_secret(at("allstep", 2), environ) == "k"
