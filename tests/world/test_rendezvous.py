"""Ranks finding each other through real stores; each rank is a thread here, since the store's clients do not mind."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from allstep.errors import WorldError
from allstep.launch.environment import ReservedPort
from allstep.placement import Placement, Rendezvous
from allstep.world.rendezvous import rendezvous
from allstep.world.torch_private import TCPStore

HOST = "127.0.0.1"


def placement(rank: int, ports: tuple[int, ...], world_size: int = 2, **options) -> Placement:
    return Placement(
        "slurm",
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        rendezvous=Rendezvous(options.pop("host", HOST), ports, agent_store=options.pop("agent_store", False)),
        run_id=options.pop("run_id", "job-1.0"),
        **options,
    )


def rendezvous_all(places: list[Placement], timeout: float = 30.0, processes: list[str] | None = None):
    """What `rendezvous` returned or raised, for each rank; all call it at once."""
    names = processes or [f"process {100 + place.rank} on here" for place in places]

    def call(place: Placement, process: str):
        try:
            return rendezvous(place, process, timeout, starts_service=False)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(call, places, names))


@pytest.fixture
def ports() -> Iterator[tuple[int, ...]]:
    with contextlib.ExitStack() as stack:
        yield tuple(stack.enter_context(ReservedPort(shared=True)).port for _ in range(3))


def assert_one_store(infos) -> None:
    infos[0].store.set("from-zero", "hello")
    assert [info.store.get("from-zero") for info in infos] == [b"hello"] * len(infos)


def test_all_ranks_get_one_store(ports):
    assert_one_store(rendezvous_all([placement(rank, ports[:1], 3) for rank in range(3)]))


def test_a_port_taken_beforehand_is_passed_over(ports):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", ports[0]))
        taken.listen()
        closer = threading.Thread(target=close_connections, args=(taken,), daemon=True)
        closer.start()
        infos = rendezvous_all([placement(rank, ports[:2]) for rank in range(2)])
        assert_one_store(infos)
        assert infos[0].server.port == ports[1]


def close_connections(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            listener.accept()[0].close()


def test_a_service_that_accepts_and_says_nothing_is_passed_over(ports):
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        silent.bind(("", ports[0]))
        silent.listen()
        infos = rendezvous_all([placement(rank, ports[:2]) for rank in range(2)])
        assert_one_store(infos)


def test_a_strangers_store_is_passed_over(ports):
    stranger = TCPStore(HOST, ports[0], None, True, timedelta(seconds=5), wait_for_workers=False)
    stranger.set("allstep/job-2.0/0", "met here")
    infos = rendezvous_all([placement(rank, ports[:2]) for rank in range(2)])
    assert_one_store(infos)
    assert infos[1].server is None
    assert infos[0].server.port == ports[1]
    assert not stranger.check(["allstep/job-1.0/0"])


def test_the_store_of_an_earlier_attempt_is_a_strangers(ports):
    earlier = rendezvous_all([placement(rank, ports[:2]) for rank in range(2)])
    earlier[0].store.set("key", "old")
    later = rendezvous_all([placement(rank, ports[:2], attempt=1) for rank in range(2)])
    assert later[0].server.port == ports[1]
    assert not later[1].store.check(["key"])


def test_rank_zero_names_the_ports_when_all_are_taken(ports):
    strangers = [TCPStore(HOST, port, None, True, timedelta(seconds=5), wait_for_workers=False) for port in ports[:2]]
    place = placement(0, ports[:2])
    with pytest.raises(WorldError, match=f"cannot serve .* port {ports[0]}, {ports[1]} in use") as raised:
        rendezvous(place, "me", 5.0, starts_service=False)
    assert "MASTER_PORT" in str(raised.value)
    assert len(strangers) == 2


def test_a_rank_that_finds_nobody_says_where_it_looked(ports):
    stranger = TCPStore(HOST, ports[1], None, True, timedelta(seconds=5), wait_for_workers=False)
    place = placement(1, ports[:2])
    with pytest.raises(WorldError) as raised:
        rendezvous(place, "me", 0.2, starts_service=False)
    message = str(raised.value)
    assert f"rank 1 of 2 (run 'job-1.0', attempt 0) did not meet the others at {HOST}" in message
    assert f"port {ports[0]}: nothing answers" in message
    assert f"port {ports[1]}: another job's store" in message
    assert "firewall" in message
    assert stranger.check(["allstep/job-1.0/0"]) is False


def test_a_host_name_that_does_not_resolve_is_named(ports, monkeypatch):
    def resolve(*args: object, **options: object) -> None:  # made up: a real resolver may take seconds, now and later
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", resolve)
    place = placement(1, ports[:1], host="no-such-host.invalid")
    with pytest.raises(WorldError, match=r"no-such-host.invalid .*does not resolve"):
        rendezvous(place, "me", 0.1, starts_service=False)


def test_two_processes_with_one_rank_are_named(ports):
    places = [placement(0, ports[:1]), placement(1, ports[:1]), placement(1, ports[:1])]
    first, *twins = rendezvous_all(
        places, processes=["process 100 on here", "process 101 on here", "process 999 on there"]
    )
    assert not isinstance(first, Exception)
    (error,) = [twin for twin in twins if isinstance(twin, Exception)]
    assert "two processes are rank 1" in str(error)
    assert "process 999 on there" in str(error)
    assert "process 101 on here" in str(error)


def test_a_rendezvous_that_is_abandoned_frees_its_port(ports):
    places = [placement(rank, ports[:1]) for rank in range(2)]
    kept = rendezvous_all(places)
    for info in kept:
        info.abandon(2)
    assert_one_store(rendezvous_all(places))
    assert len(kept) == 2


def test_an_agents_store_keeps_attempts_and_worlds_apart(ports):
    agent = TCPStore(HOST, ports[0], None, True, timedelta(seconds=5), wait_for_workers=False)

    def together(**options):
        infos = rendezvous_all([placement(rank, ports[:1], agent_store=True, **options) for rank in range(2)])
        assert [info.server for info in infos] == [None, None]
        fresh = not infos[1].store.check(["from-zero"])
        assert_one_store(infos)
        return fresh

    assert [together(), together(), together(attempt=1)] == [True] * 3
    assert agent.num_keys() > 0
