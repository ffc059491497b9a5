"""A relay and a hub, driven by the test, over real sockets."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from allstep.diagnosis.hang import HangLimits
from allstep.diagnosis.rank_outcome import OutcomeKind
from allstep.monitor.relay import Relay
from allstep.monitor.service import AllEnded, MonitorSettings, Verdict
from allstep.protocol.messages import Finish, Goodbye, Leave, NodeHello, RankEnding, Refused, Welcome
from allstep.protocol.worker_exit import WorkerExit
from tests.monitor.driving import KEY, Caller, Clock, Driven, listening, registration, serving


@contextlib.contextmanager
def relaying(
    port: int,
    ranks: Sequence[int],
    world_size: int,
    *,
    limits: str = "",
    key: str = KEY,
    node: int = 1,
    supervised: bool = True,
    clock: Callable[[], float] | None = None,
    remark: Callable[[], str] | None = None,
    report: Callable[[str], None] | None = None,
) -> Iterator[Driven]:
    def make(selector: selectors.BaseSelector, listener: socket.socket, clock: Callable[[], float]) -> Relay:
        return Relay(
            selector,
            listener,
            MonitorSettings(key, 0, world_size, HangLimits.parse(limits), supervised, remark=remark, report=report),
            upstream=("127.0.0.1", port),
            node_rank=node,
            ranks=ranks,
            clock=clock,
        )

    driven = Driven(make, clock or Clock())
    with contextlib.closing(driven):
        yield driven


@contextlib.contextmanager
def two_nodes(
    limits: str = "", *, supervised: bool = True, remark: Callable[[], str] | None = None
) -> Iterator[tuple[Driven, Driven, list[Caller]]]:
    """Rank 0 at the head, ranks 1 and 2 at a relay; all welcomed."""
    with (
        serving(3, limits=limits, supervised=supervised) as hub,
        relaying(hub.port, (1, 2), 3, limits=limits, supervised=supervised, clock=hub.clock, remark=remark) as relay,
    ):
        hub.others.append(relay)
        callers = [Caller(relay if rank else hub, rank, 3).come() for rank in range(3)]
        for caller in callers:
            caller.driven = hub
            caller.hears(Welcome)
        yield hub, relay, callers
        for caller in callers:
            caller.close()


def test_what_ranks_say_reaches_the_head_through_a_relay():
    with two_nodes() as (hub, _, ranks):
        ranks[2].beat(iteration=12)
        hub.until(lambda: hub.service.progress() == (1, 12))
        assert hub.service.status(2).iteration == 12


def test_a_failure_behind_a_relay_is_judged_at_the_head_for_all_nodes():
    with two_nodes() as (hub, relay, ranks):
        ranks[2].fail()
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.kind) == (2, OutcomeKind.ERROR)
        hub.service.order_leave("rank 2 failed", 84, printer=1, report="THE REPORT")
        assert ranks[0].hears(Leave) == Leave("rank 2 failed", 84)
        assert ranks[1].hears(Leave) == Leave("rank 2 failed", 84, "THE REPORT")
        assert ranks[2].hears(Leave).code is None
        hub.until(lambda: any(isinstance(each, Leave) and each.spared == (2,) for each in relay.events))
        hub.service.finish("the text", 1)
        hub.until(lambda: Finish("the text", 1) in relay.events)


def test_what_a_node_knows_of_a_failure_is_in_the_diagnosis():
    remark = "likely out of memory"
    with two_nodes(supervised=False, remark=lambda: remark) as (hub, _, ranks):
        ranks[2].fail()
        assert hub.verdict().cause.note == remark


def test_a_node_has_no_remark_about_an_error_that_follows_from_another():
    with two_nodes(supervised=False, remark=lambda: "likely out of memory") as (hub, _, ranks):
        ranks[2].fail("RuntimeError", "Connection closed by peer", derived=True)
        assert hub.verdict().cause.note == ""


def test_a_head_that_goes_after_its_order_to_leave_is_no_failure_of_its_own():
    with two_nodes(supervised=False) as (hub, relay, ranks):
        ranks[2].fail()
        hub.verdict()
        hub.service.order_leave("rank 2 failed", 84)
        hub.until(lambda: any(isinstance(each, Leave) for each in relay.events))
        hub.service.close()
        relay.pass_time(1.5)
        assert not any(isinstance(each, Verdict) for each in relay.events)


@contextlib.contextmanager
def one_rank_a_node(**settings: Any) -> Iterator[tuple[Driven, list[Driven], list[Caller]]]:
    """Three nodes of one rank each, without a supervisor; all welcomed."""
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(serving(3, supervised=False))
        for node in (1, 2):
            given = {"node": node, "supervised": False, "clock": hub.clock, **settings}
            hub.others.append(stack.enter_context(relaying(hub.port, (node,), 3, **given)))
        relays = list(hub.others)
        callers = [Caller(service, rank, 3).come() for rank, service in enumerate((hub, *relays))]
        for caller in callers:
            stack.callback(caller.close)
            caller.driven = hub
            caller.hears(Welcome)
        callers[0].beat(iteration=7)
        hub.until(lambda: hub.service.progress() == (1, 7))
        yield hub, relays, callers


@pytest.mark.parametrize(
    ("code", "kind", "what"),
    [
        (-9, OutcomeKind.SIGNAL, "killed by SIGKILL"),
        (3, OutcomeKind.EXIT, "exit code 3"),
        (0, OutcomeKind.EARLY, "left early"),
    ],
)
def test_a_head_that_goes_with_its_rank_has_said_how_that_ended(code, kind, what):
    with one_rank_a_node() as (hub, relays, _):
        hub.service.foretell(WorkerExit(0, code))
        hub.others.clear()
        hub.service.close()
        for relay in relays:
            diagnosis = relay.verdict()
            assert (diagnosis.cause.rank, diagnosis.cause.kind, diagnosis.world_size) == (0, kind, 3)
            assert diagnosis.cause.what.startswith(what)
            assert (diagnosis.cause.host, diagnosis.cause.iteration) == ("a", 7)
        assert [relay.service.writes_report for relay in relays] == [True, False]


def test_a_head_that_is_killed_before_it_says_a_word_is_reported_by_one_relay():
    with one_rank_a_node() as (hub, relays, _):
        hub.others.clear()
        hub.service.close()
        assert [relay.verdict().cause.kind for relay in relays] == [OutcomeKind.SERVICE_LOST] * 2
        assert [relay.service.writes_report for relay in relays] == [True, False]


def test_a_head_that_falls_silent_is_reported_by_each_node():
    with one_rank_a_node(limits="link=2") as (hub, relays, _):
        hub.others.clear()  # as if the network were cut: nobody drives the head
        for relay in relays:
            assert "not heard from" in relay.verdict().cause.what
            assert relay.service.writes_report


def test_the_report_is_left_to_a_node_whose_world_is_open():
    with one_rank_a_node() as (hub, relays, ranks):
        ranks[1].say(Goodbye(1))
        hub.until(lambda: 1 not in hub.service.present())
        hub.pass_time(0.1)  # less than the period in which a head says so anyway
        hub.others.clear()
        hub.service.close()
        assert relays[1].verdict().cause.kind is OutcomeKind.SERVICE_LOST
        assert relays[1].service.writes_report


def test_an_error_of_another_node_comes_before_an_end_that_follows():
    with one_rank_a_node() as (hub, relays, ranks):
        ranks[1].fail()
        hub.pass_time(0.1)
        hub.service.foretell(WorkerExit(0, -6))
        hub.others.clear()
        hub.service.close()
        assert relays[0].verdict().cause.rank == 1


def test_a_word_about_ranks_of_others_counts_for_nothing():
    with one_rank_a_node() as (hub, relays, _):
        hub.service.foretell(WorkerExit(1, -9))  # which is the first relay's own
        hub.others.clear()
        hub.service.close()
        assert relays[0].verdict().cause.kind is OutcomeKind.SERVICE_LOST
    with serving(3, supervised=False) as hub:
        node = Caller(hub).come(NodeHello(0, 1, "host", (1,)))
        node.say(RankEnding(WorkerExit(2, -9), registration(2)))
        node.say(RankEnding(WorkerExit(1, -9), registration(1)))
        hub.until(lambda: hub.service.connected == 1)
        hub.pass_time(0.1)
        node.close()
        hub.pass_time(0.5)
        assert hub.service.ends() == {}  # rank 1 had not come to its World


def test_a_head_without_ranks_leaves_its_report_to_the_lowest_other_node():
    written: list[str] = []
    with one_rank_a_node(report=written.append) as (hub, relays, ranks):
        assert hub.service.writes_report
        hub.service.foretell(WorkerExit(0, -9))
        hub.service.worker_ended(WorkerExit(0, -9))
        assert hub.verdict().cause.what.startswith("killed by SIGKILL")
        assert not hub.service.writes_report
        hub.service.order_leave("rank 0 failed", 84, report="THE REPORT")
        assert ranks[1].hears(Leave) == ranks[2].hears(Leave) == Leave("rank 0 failed", 84)
        hub.service.close()
        for relay in relays:
            relay.pass_time(0.5)
            assert not any(isinstance(each, Verdict) for each in relay.events)
    assert written == ["THE REPORT"]


def test_a_relay_that_goes_with_its_rank_has_said_how_that_ended():
    with one_rank_a_node() as (hub, relays, _):
        relays[1].service.foretell(WorkerExit(2, -11))
        hub.others.remove(relays[1])
        relays[1].close()
        cause = hub.verdict().cause
        assert (cause.rank, cause.kind) == (2, OutcomeKind.SIGNAL)


def test_a_head_that_goes_after_a_nodes_worlds_were_closed_is_no_failure():
    with one_rank_a_node() as (hub, relays, ranks):
        for caller in ranks:
            caller.say(Goodbye(caller.rank))
            caller.close()
        hub.until(lambda: not hub.service.present())
        hub.others.clear()
        hub.service.close()
        for relay in relays:
            relay.pass_time(0.5)
            assert not any(isinstance(each, Verdict) for each in relay.events)


def test_the_end_of_a_worker_behind_a_relay_counts_at_the_head():
    with two_nodes() as (hub, relay, ranks):
        ranks[1].close()
        relay.service.worker_ended(WorkerExit(1, -9, note="memory ran out"))
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.kind, diagnosis.cause.note) == (
            1,
            OutcomeKind.SIGNAL,
            "memory ran out",
        )
        for rank, end in ((0, hub), (2, relay)):
            end.service.worker_ended(WorkerExit(rank, 84))
        hub.event(AllEnded)


def test_a_rank_gone_behind_a_relay_is_known_at_the_head():
    with two_nodes(supervised=False) as (hub, _, ranks):
        ranks[2].close()
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.kind) == (2, OutcomeKind.LOST)


def test_losing_a_node_is_named_at_the_head():
    with two_nodes() as (hub, relay, _):
        hub.others.clear()
        relay.close()
        diagnosis = hub.verdict()
        assert (diagnosis.cause.kind, diagnosis.exit_code) == (OutcomeKind.NODE_LOST, 84)
        assert "node 1" in diagnosis.cause.what
        assert diagnosis.others[0].kind is OutcomeKind.NODE_LOST


def test_a_node_that_is_not_heard_from_is_lost_at_the_limit_and_not_before():
    with two_nodes("link=2.5") as (hub, _, ranks):
        hub.others.clear()  # as if the network were cut: nobody drives the relay

        def turn() -> bool:
            ranks[0].beat()
            hub.pass_time(0.2)
            return any(isinstance(event, Verdict) for event in hub.events)

        hub.pass_time(1.5)
        assert not [event for event in hub.events if isinstance(event, Verdict)]
        hub.until(turn)
        assert hub.verdict().cause.kind is OutcomeKind.NODE_LOST


def test_a_node_that_never_connects_is_lost():
    with serving(2, limits="link=0.5") as hub, contextlib.closing(Caller(hub, 0).come()):
        hub.service.expect_node(1, [1])
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.kind) == (1, OutcomeKind.NODE_LOST)
        assert "did not connect" in diagnosis.cause.what


def test_losing_the_head_is_a_verdict_at_the_relay():
    with two_nodes("link=2") as (hub, relay, ranks):
        ranks[1].driven = ranks[2].driven = relay
        diagnosis = relay.verdict()  # the head is not driven meanwhile
        assert (diagnosis.cause.kind, diagnosis.exit_code) == (OutcomeKind.SERVICE_LOST, 84)
        assert "not heard from" in diagnosis.cause.what
        relay.service.order_leave("the head is lost", 84)
        assert ranks[1].hears(Leave).code == 84
        assert hub.service.deadline() is not None


def test_a_head_that_closes_is_a_verdict_at_the_relay_at_once():
    with two_nodes() as (hub, relay, _):
        hub.service.close()
        assert "closed the connection" in relay.verdict().cause.what


def test_a_head_that_is_finished_may_close():
    with two_nodes() as (hub, relay, _):
        hub.service.finish("", 0)
        hub.until(lambda: Finish("", 0) in relay.events)
        hub.service.close()
        relay.pass_time(0.5)
        assert not [event for event in relay.events if isinstance(event, Verdict)]


def test_a_head_that_never_answers_is_a_verdict_in_bounded_time(monkeypatch):
    monkeypatch.setattr("allstep.monitor.uplink.CONNECT_S", 1.0)
    sock = listening()
    port = sock.getsockname()[1]
    sock.close()
    with relaying(port, (1,), 2) as relay:
        assert "could not be reached" in relay.verdict().cause.what


@pytest.mark.parametrize("first", ["127.0.0.9", "192.0.2.1"], ids=["refuses", "is silent"])
def test_a_head_is_reached_at_another_of_its_addresses(monkeypatch, first):
    """192.0.2.0/24 is for documentation: no machine has such an address."""
    monkeypatch.setattr("allstep.monitor.uplink.ANSWER_S", 0.5)
    stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    with serving(2) as hub:
        found = [(*stream, (first, hub.port)), (*stream, ("127.0.0.1", hub.port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
        with relaying(hub.port, (1,), 2, clock=hub.clock) as relay:
            relay.others.append(hub)
            relay.until(lambda: hub.service.connected == 1)


def test_a_head_of_another_run_is_a_verdict_at_the_relay():
    with serving(2) as hub, relaying(hub.port, (1,), 2, key="other", clock=hub.clock) as relay:
        relay.others.append(hub)
        cause = relay.verdict().cause
        assert cause.kind is OutcomeKind.SERVICE_LOST
        assert "what answers does not have this run's key" in cause.what
        assert hub.service.connected == 0


def test_a_relay_whose_ranks_were_turned_away_is_left_alone_and_may_go():
    with serving(2, supervised=False) as hub, relaying(hub.port, (1,), 2, supervised=False, clock=hub.clock) as relay:
        hub.others.append(relay)
        callers = [Caller(hub, 1, registration=registration(1, pid=1)).come(), Caller(relay, 1, 2).come()]
        for caller in callers:
            caller.driven = hub
            caller.hears(Refused)
            caller.close()
        hub.until(lambda: relay.service.connected == 0)
        hub.others.clear()
        relay.close()
        hub.until(lambda: hub.service.connected == 0)
        hub.pass_time(0.5)
        assert not [event for event in hub.events if isinstance(event, Verdict)]


@pytest.mark.parametrize("supervised", [True, False])
def test_losing_the_head_after_a_refusal_is_told_to_a_supervisor_only(supervised: bool):
    # The head waits for no node of this number.
    with serving(2) as hub, relaying(hub.port, (1,), 2, node=7, supervised=supervised, clock=hub.clock) as relay:
        relay.others.append(hub)
        if supervised:
            assert relay.verdict().cause.kind is OutcomeKind.SERVICE_LOST
        else:
            relay.until(lambda: len(relay.selector.get_map()) == 1)  # it only listens
            relay.pass_time(0.1)
            assert not [event for event in relay.events if isinstance(event, Verdict)]


def test_a_doubled_rank_on_another_node_is_named():
    with serving(2) as hub, relaying(hub.port, (1,), 2, clock=hub.clock) as relay:
        hub.others.append(relay)
        here = Caller(hub, registration=registration(1, host="head", pid=1)).come()
        there = Caller(relay, registration=registration(1, host="node", pid=2)).come()
        there.driven = hub
        for caller in (here, there):
            reason = caller.hears(Refused).reason
            assert "two processes are rank 1" in reason
            assert "process 1 on head" in reason
            assert "process 2 on node" in reason


def test_a_silent_rank_behind_a_relay_is_found_by_its_own_silence():
    with two_nodes("silence=1.5") as (hub, _, ranks):
        ranks[2].beat()

        def turn() -> bool:
            ranks[0].beat()
            ranks[1].beat()
            hub.pass_time(0.3)
            return any(isinstance(event, Verdict) for event in hub.events)

        hub.until(turn)
        assert (hub.verdict().cause.rank, hub.verdict().cause.kind) == (2, OutcomeKind.HANG)
