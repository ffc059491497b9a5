"""Where ranks find each other: one TCPStore, agreed to be theirs.

Contract: `rendezvous` is called by every rank of a world of several, once per start. Rank 0 serves a store on the first
candidate port that is free (unless the launcher's agent serves one) and writes the name of the run into it; the others
try the candidates in turn and accept only a store that holds this name, so a stranger's store or service on a port is
passed over. After: the rank holds a store of its start's own name space, and knows the service at which all ranks
register, which judges whether they are all there and fit together. A second process of a rank registers there as
well, so that all ranks hear of it. What can go wrong: ports taken, a host that does not answer, rank
0 missing, a second process of a rank whose first one has finished; each is a WorldError that says which.

The name space carries run, attempt and, where one store outlives several Worlds (an agent's), the generation: how
many times this rank has met there.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from allstep.errors import WorldError
from allstep.placement import Placement, Rendezvous
from allstep.protocol.registration import two_processes
from allstep.world.monitor_link import MonitorService, head_service, sidecar_service
from allstep.world.store import BoundedStore, abandon_thread, poll
from allstep.world.torch_private import PrefixStore, TCPStore

_CONNECT_S = 2.0
_HANDSHAKE_S = (1.0, 16.0)
_IDENTIFY_S = 0.5
_HEARD_S = 5.0
_MET = "met"  # counts, in the store, the ranks that need it no more to find the others


@dataclass(slots=True)
class RendezvousInfo:
    """What a rank holds after it has met the others: the store, and on rank 0 its server, which lives while it is held.

    `service` is where the ranks introduce themselves, where a sidecar was started for that.
    """

    store: BoundedStore
    server: TCPStore | None = None
    service: MonitorService | None = None

    def abandon(self, world_size: int) -> None:
        """No group comes of it: let the server go, once the others have found what they look for in it."""
        if self.server is not None:
            with contextlib.suppress(dist.DistError, WorldError):
                poll(lambda: self.store.add(_MET, 0) >= world_size, time.monotonic() + _HEARD_S)
            self.server = None  # else the traceback would keep the port taken
        if self.service is not None:
            self.service.release()


def rendezvous(placement: Placement, process: str, timeout: float, *, starts_service: bool = True) -> RendezvousInfo:
    """Find the other ranks.

    Args:
        placement: of a world of several.
        process: which process this is, for errors.
        timeout: seconds that the ranks have to arrive, counted on each from its own call.
        starts_service: have a sidecar started; without it the launcher serves.

    Raises:
        WorldError: this rank did not find the others' store, or another process has its rank.
    """
    assert placement.rendezvous is not None
    place = placement.rendezvous
    deadline = time.monotonic() + timeout
    name = f"allstep/{placement.run_id}/{placement.attempt}"

    def enter(client: TCPStore, server: TCPStore | None = None) -> RendezvousInfo:
        store, rival = _own_space(client, name, placement.rank, process, deadline)
        if rival:
            text = two_processes(placement.rank, rival, process)
            return RendezvousInfo(store, service=_service_for_rival(store, placement, deadline, text, starts_service))
        service = sidecar_service(store, placement, timeout, deadline) if starts_service else None
        with contextlib.suppress(dist.DistError, WorldError):  # a server that waits for just this may go first
            store.add(_MET, 1)
        return RendezvousInfo(store, server, service)

    if placement.rank == 0 and not place.agent_store:
        try:
            server, port = _serve(place, timeout)
        except WorldError:
            taken = [_try_port(place.host, port, name, _HANDSHAKE_S[0], timeout) for port in place.ports]
            stores = [store for store in taken if not isinstance(store, str)]
            if not stores:
                raise
            return enter(stores[0])  # another process is rank 0 of this run
        try:
            server.set(name, "met here")
            return enter(_client("127.0.0.1", port, _HANDSHAKE_S[1], timeout), server)
        except BaseException:
            del server  # else the traceback would keep the port taken
            raise
    while True:
        try:
            return enter(_find(place, None if place.agent_store else name, placement, deadline, timeout))
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
        asked = BoundedStore(store, patience)
        if name is None or poll(lambda: asked.check([name]), time.monotonic() + _IDENTIFY_S):
            return store
    except (TimeoutError, WorldError, dist.DistError):
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
        abandon_thread(thread)
        raise TimeoutError(f"{host}:{port} accepted and did not answer in {patience * 2:g} s")
    if isinstance(made[0], BaseException):
        raise made[0]
    made[0].set_timeout(timedelta(seconds=timeout))
    return made[0]


def _own_space(client: TCPStore, name: str, rank: int, process: str, deadline: float) -> tuple[BoundedStore, str]:
    """The name space of this start of the ranks in a store that may have seen others, and who else is this rank."""
    base = BoundedStore(PrefixStore(name, client))
    owner = base.compare_set(f"owner/{rank}", "", process).decode()
    if owner == process:
        return base.with_prefix(f"generation/{base.add(f'generation/{rank}', 1)}"), ""
    poll(lambda: base.add(f"generation/{rank}", 0) > 0, deadline)
    return base.with_prefix(f"generation/{base.add(f'generation/{rank}', 0)}"), owner


def _service_for_rival(
    store: BoundedStore, placement: Placement, deadline: float, text: str, starts_service: bool
) -> MonitorService:
    """Where a second process of a rank says that it is here, so that the service can tell all ranks; else `text`."""
    service = head_service(store, placement, deadline) if starts_service else None
    if service is None:
        raise WorldError(text)
    return service


def _text(placement: Placement, timeout: float, what: str) -> str:
    assert placement.rendezvous is not None
    place = placement.rendezvous
    ports = ", ".join(map(str, place.ports))
    return (
        f"rank {placement.rank} of {placement.world_size} (run {placement.run_id!r}, attempt {placement.attempt}) "
        f"did not meet the others at {place.host}, port {ports}, within {timeout:g} s: {what}. Check that rank 0 "
        "runs and calls init, that the host name and port are right, and that no firewall is between"
    )
