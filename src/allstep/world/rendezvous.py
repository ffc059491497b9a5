"""Where ranks find each other: one TCPStore, agreed to be theirs.

Contract: `meet` is called by every rank of a world of several, once per start. Rank 0 serves a store on the first
candidate port that is free (unless the launcher's agent serves one) and writes the name of the run into it; the others
try the candidates in turn and accept only a store that holds this name, so a stranger's store or service on a port is
passed over. Then each rank puts its `Arrival` there and waits for rank 0's verdict. After: all ranks are present and
fit together, and hold a store of their own name space. What can go wrong: ports taken, a host that does not answer,
ranks missing, doubled, or at odds with each other; each is a WorldError that says which, on every rank that can know.

The name space carries run, attempt and, where one store outlives several Worlds (an agent's), the generation: how
many times this rank has met there.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from allstep.errors import WorldError
from allstep.placement import Placement, Rendezvous
from allstep.world.polling import poll
from allstep.world.roll_call import Arrival, objection
from allstep.world.stores import PrefixStore, Store, TCPStore

_CONNECT_S = 2.0
_HANDSHAKE_S = (1.0, 16.0)
_IDENTIFY_S = 0.5
_HEARD_S = 5.0
_NAMED = 16


@dataclass(slots=True)
class Meeting:
    """What ranks hold after they have met: the store, and on rank 0 its server, which lives as long as it is held."""

    store: Store
    server: TCPStore | None = None


def meet(placement: Placement, arrival: Arrival, timeout: float) -> Meeting:
    """Find the other ranks.

    Args:
        placement: of a world of several.
        arrival: how this rank introduces itself.
        timeout: seconds that the ranks have to arrive, counted on each from its own call.

    Raises:
        WorldError: they did not all arrive, or do not fit together.
    """
    assert placement.rendezvous is not None
    place = placement.rendezvous
    deadline = time.monotonic() + timeout
    name = f"allstep/{placement.run_id}/{placement.attempt}"
    server: TCPStore | None = None
    if placement.rank == 0 and not place.agent_store:
        server, port = _serve(place, timeout)
        try:
            server.set(name, "met here")
            client = _client("127.0.0.1", port, _HANDSHAKE_S[1], timeout)
            return Meeting(_call_roll(client, name, placement, arrival, deadline, timeout), server)
        except BaseException:
            server = None  # else the traceback would keep the port taken
            raise
    while True:
        client = _find(place, None if place.agent_store else name, placement, deadline, timeout)
        try:
            return Meeting(_call_roll(client, name, placement, arrival, deadline, timeout))
        except dist.DistNetworkError as error:
            # The store went away under us: a World that rank 0 was just closing, on the same port. Its next one comes.
            if time.monotonic() >= deadline:
                raise WorldError(_text(placement, timeout, f"the store was lost: {error}")) from error


def _serve(place: Rendezvous, timeout: float) -> tuple[TCPStore, int]:
    problems = []
    for port in place.ports:
        try:
            server = TCPStore("127.0.0.1", port, None, True, timedelta(seconds=timeout), wait_for_workers=False)
        except dist.DistNetworkError as error:
            problems.append((port, error))
        else:
            return server, port
    ports = ", ".join(str(port) for port, _ in problems)
    raise WorldError(
        f"rank 0 cannot serve the store on {socket.gethostname()}: port {ports} in use. Another job, or another "
        "process that takes itself for rank 0 of this one, holds it; end it, or choose another MASTER_PORT. "
        f"The system said: {str(problems[-1][1]).splitlines()[0]}"
    ) from problems[-1][1]


def _find(place: Rendezvous, name: str | None, placement: Placement, deadline: float, timeout: float) -> TCPStore:
    seen: dict[int, str] = {}
    found: list[TCPStore] = []
    patience = _HANDSHAKE_S[0]

    def look() -> bool:
        nonlocal patience
        for port in place.ports:
            store = _try_port(place.host, port, name, patience, timeout)
            if not isinstance(store, str):
                found.append(store)
                return True
            seen[port] = store
        patience = min(2 * patience, _HANDSHAKE_S[1])
        return False

    if not poll(look, deadline):
        ports = "; ".join(f"port {port}: {what}" for port, what in seen.items())
        raise WorldError(_text(placement, timeout, f"rank 0's store was not found on {place.host} ({ports})"))
    return found[0]


def _try_port(host: str, port: int, name: str | None, patience: float, timeout: float) -> TCPStore | str:
    """The store of this run, or what is there instead."""
    try:
        # torch's client prints a page of text for each failed attempt, so it is only shown a port that answers.
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except socket.gaierror as error:
        return f"the host name does not resolve ({error.strerror})"
    except OSError as error:
        return f"nothing answers ({error.strerror or error})"
    try:
        store = _client(host, port, patience, timeout)
        if name is None or poll(lambda: store.check([name]), time.monotonic() + _IDENTIFY_S):
            return store
    except (TimeoutError, dist.DistError):
        return "something answers that is not a torch store"
    return "another job's store"


def _client(host: str, port: int, patience: float, timeout: float) -> TCPStore:
    """A client, or TimeoutError where the peer accepts and stays silent: torch's own limit does not cover that."""
    made: list[TCPStore | BaseException] = []

    def connect() -> None:
        limit = timedelta(seconds=patience)
        try:
            made.append(TCPStore(host, port, None, False, limit, wait_for_workers=False))
        except BaseException as error:
            made.append(error)

    thread = threading.Thread(target=connect, daemon=True, name="allstep-store-handshake")
    thread.start()
    thread.join(patience * 2)
    if not made:
        raise TimeoutError(f"{host}:{port} accepted and did not answer in {patience * 2:g} s")
    if isinstance(made[0], BaseException):
        raise made[0]
    made[0].set_timeout(timedelta(seconds=timeout))
    return made[0]


def _call_roll(
    client: Store, name: str, placement: Placement, arrival: Arrival, deadline: float, timeout: float
) -> Store:
    rank, world_size = placement.rank, placement.world_size
    base = PrefixStore(name, client)
    owner = base.compare_set(f"owner/{rank}", "", arrival.process).decode()
    if owner != arrival.process:
        raise WorldError(
            f"two processes are rank {rank}: {owner} and {arrival.process}; give each process its own RANK, "
            "or each job its own MASTER_PORT"
        )
    store = PrefixStore(f"generation/{base.add(f'generation/{rank}', 1)}", base)
    store.set(f"arrival/{rank}", arrival.to_json())
    store.add("arrived", 1)
    if rank == 0:
        everyone = poll(lambda: store.add("arrived", 0) >= world_size, deadline)
        verdict = _judge(store, world_size) if everyone else _missing(store, world_size, timeout)
        store.set("verdict", verdict or "go")
        # The others read it from this process, which may end right after: it stays until they have, if they can.
        poll(lambda: store.add("heard", 0) >= store.add("arrived", 0) - 1, time.monotonic() + _HEARD_S)
        if verdict:
            raise WorldError(verdict)
        return store
    if not poll(lambda: store.check(["verdict"]), deadline + _HEARD_S):
        if store.add("arrived", 0) < world_size:
            raise WorldError(_missing(store, world_size, timeout))
        raise WorldError(_text(placement, timeout, "all arrived, but rank 0 did not say so"))
    verdict = store.get("verdict").decode()
    store.add("heard", 1)
    if verdict != "go":
        raise WorldError(verdict)
    return store


def _judge(store: Store, world_size: int) -> str:
    texts = store.multi_get([f"arrival/{rank}" for rank in range(world_size)])
    return objection([Arrival.from_json(text) for text in texts])


def _missing(store: Store, world_size: int, timeout: float) -> str:
    absent = [rank for rank in range(world_size) if not store.check([f"arrival/{rank}"])]
    named = ", ".join(map(str, absent[:_NAMED])) + (", ..." if len(absent) > _NAMED else "")
    return (
        f"{len(absent)} of {world_size} ranks did not arrive within {timeout:g} s: {named}; check that their processes "
        "started, can reach rank 0's host and port, and call init; or give init a longer timeout"
    )


def _text(placement: Placement, timeout: float, what: str) -> str:
    assert placement.rendezvous is not None
    place = placement.rendezvous
    ports = ", ".join(map(str, place.ports))
    return (
        f"rank {placement.rank} of {placement.world_size} (run {placement.run_id!r}, attempt {placement.attempt}) "
        f"did not meet the others at {place.host}, port {ports}, within {timeout:g} s: {what}. Check that rank 0 "
        "runs and calls init, that the host name and port are right, and that no firewall is between"
    )
