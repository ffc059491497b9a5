"""How the ranks of a world find each other: through one TCPStore, which holds the name of their run.

Contract: every rank of a world of several calls `rendezvous` once per start. Rank 0 serves a store on the first
candidate port that is free, and writes the name of the run into it. (Where a launcher's agent serves one, that is
used.) The other ranks try the candidates in turn and accept only a store that holds this name, so another job's store
or service on a port is passed over.

Anybody can know the name, so its value in the store is a proof that rank 0 has what only this run's ranks have
(`monitor_link.rank_secret`), made for this port: what was read from the real store is of no use at another. A store
with the name and without the proof is an impostor's and ends the run. Where the ranks have no secret, only the first
candidate is tried: which of two stores is theirs could not be told.

After the call a rank holds a store with keys of this start alone, and the monitoring service at which all ranks
register, where a sidecar had to be started for it.

A second process with a rank that is taken already is sent to the same service, so that all ranks are told of it. What
can go wrong: ports in use, a host that does not answer, rank 0 missing, a second process of a rank whose first one has
finished. Each is a WorldError that says which.

Keys begin with run and attempt. An agent's store outlives several Worlds, so they also have the generation: how many
times this rank has called `rendezvous` in this store.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from allstep.errors import WorldError
from allstep.placement import Placement, Rendezvous
from allstep.protocol.address import EVERYWHERE, HERE, listen
from allstep.protocol.authentication import derived_key
from allstep.protocol.registration import two_processes
from allstep.store_socket import is_given, on_given_socket
from allstep.world.bounded_store import BoundedStore, abandon_thread, poll
from allstep.world.monitor_link import MonitorService, head_service, rank_secret, sidecar_service
from allstep.world.torch_private import PrefixStore, TCPStore

_CONNECT_S = 2.0  # for a port to accept
_HANDSHAKE_S = (1.0, 16.0)  # for a store to answer its client, at first and at most: it is doubled from try to try
_IDENTIFY_S = 0.5  # for the run's name to be there, which rank 0 writes right after it began to serve
_ABANDON_S = 5.0  # that rank 0's server stays after a failure, for ranks that have yet to read why
_LOOPBACK = (HERE, "localhost")
_FOUND_KEY = "found"  # counts the ranks that need the store no more to find the others


@dataclass(slots=True)
class RendezvousInfo:
    """What a rank holds after the rendezvous.

    Attributes:
        store: of this start of the ranks.
        server: on rank 0, which serves the store for as long as this is held.
        service: where the ranks register, if a sidecar was started for it.
    """

    store: BoundedStore
    server: TCPStore | None = None
    service: MonitorService | None = None

    def abandon(self, world_size: int) -> None:
        """No process group is opened: let the server go, once the others have found what they look for in it."""
        if self.server is not None:
            with contextlib.suppress(dist.DistError, WorldError):
                poll(lambda: self.store.add(_FOUND_KEY, 0) >= world_size, time.monotonic() + _ABANDON_S)
            self.server = None  # else the traceback would keep the port taken
        if self.service is not None:
            self.service.release()


def rendezvous(placement: Placement, process: str, timeout: float, *, starts_service: bool = True) -> RendezvousInfo:
    """Find the other ranks.

    Args:
        placement: of a world of several.
        process: which process this is, in words, for the message about two processes of a rank.
        timeout: seconds that the ranks have to arrive, counted on each from its own call.
        starts_service: have a sidecar started; without it the launcher serves.

    Raises:
        WorldError: this rank did not find the others' store, or another process has its rank.
    """
    assert placement.rendezvous is not None
    secret = rank_secret(placement, os.environ)
    ports = placement.rendezvous.ports if secret else placement.rendezvous.ports[:1]
    place = replace(placement.rendezvous, ports=ports)
    deadline = time.monotonic() + timeout
    name = StoreName(f"allstep/{placement.run_id}/{placement.attempt}", secret)

    def enter(client: TCPStore, server: TCPStore | None = None) -> RendezvousInfo:
        store, rival = _own_space(client, name.text, placement.rank, process, deadline)
        if rival:
            text = two_processes(placement.rank, rival, process)
            return RendezvousInfo(store, service=_service_for_rival(store, placement, deadline, text, starts_service))
        service = sidecar_service(store, placement, timeout, deadline) if starts_service else None
        with contextlib.suppress(dist.DistError, WorldError):  # rank 0 may close its server as soon as it reads this
            store.add(_FOUND_KEY, 1)
        return RendezvousInfo(store, server, service)

    if placement.rank == 0 and not place.agent_store:
        try:
            server, port = _serve(place, timeout, alone=placement.nodes == 1)
        except WorldError:
            # No port is free. If a store of this very run holds one, another process is rank 0 too, and both are told.
            taken = [_try_port(place.host, port, name, _HANDSHAKE_S[0], timeout) for port in place.ports]
            stores = [store for store in taken if not isinstance(store, str)]
            if not stores:
                raise
            return enter(stores[0])  # another process is rank 0 of this run
        try:
            server.set(name.text, name.proof(port))
            return enter(_client("127.0.0.1", port, _HANDSHAKE_S[1], timeout), server)
        except BaseException:
            del server  # else the traceback would keep the port taken
            raise
    while True:
        try:
            return enter(_find(place, None if place.agent_store else name, placement, deadline, timeout))
        except dist.DistNetworkError as error:
            # This was the store of a World that rank 0 was just closing, on the same port. Its next one comes.
            if time.monotonic() >= deadline:
                raise WorldError(_not_found(placement, timeout, f"the store was lost: {error}")) from error


@dataclass(frozen=True, slots=True)
class StoreName:
    """The name of a run in its store, and the secret of its ranks; empty where they have none."""

    text: str
    secret: str

    def proof(self, port: int) -> str:
        """The value of the name in the store that rank 0 serves at this port."""
        return derived_key(self.secret, "store", self.text, port)


def _serve(place: Rendezvous, timeout: float, *, alone: bool) -> tuple[TCPStore, int]:
    """Serve at the first free port: on the supervisor's socket, or one of our own; on loopback where that is enough."""
    problems: list[tuple[int, Exception]] = []
    host = HERE if alone and place.host in _LOOPBACK else EVERYWHERE
    make: Callable[..., TCPStore] = partial(
        on_given_socket(TCPStore),
        "127.0.0.1",
        is_master=True,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )
    for port in place.ports:
        try:
            if not is_given():
                with contextlib.suppress(TypeError), listen(host, port) as own:  # TypeError: it takes no socket
                    return make(port=port, master_listen_fd=os.dup(own.fileno())), port
            return make(port=port), port
        except (OSError, dist.DistNetworkError) as error:
            problems.append((port, error))
    ports = ", ".join(str(port) for port, _ in problems)
    raise WorldError(
        f"rank 0 cannot serve the store on {socket.gethostname()}: port {ports} in use. Another job, or another "
        "process that takes itself for rank 0 of this one, holds it; end it, or choose another MASTER_PORT. "
        f"The system said: {str(problems[-1][1]).splitlines()[0]}"
    ) from problems[-1][1]


def _find(place: Rendezvous, name: StoreName | None, placement: Placement, deadline: float, timeout: float) -> TCPStore:
    seen: dict[int, str] = {}
    found: list[TCPStore] = []
    patience = _HANDSHAKE_S[0]

    # A peer that accepts and stays silent may be slow or a stranger: each round gives it twice the time.
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
        raise WorldError(_not_found(placement, timeout, f"rank 0's store was not found on {place.host} ({ports})"))
    return found[0]


def _try_port(host: str, port: int, name: StoreName | None, patience: float, timeout: float) -> TCPStore | str:
    """The store of this run, or what is there instead.

    Raises:
        WorldError: it has this run's name, and is not this run's.
    """
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
        if name is None:
            return store
        if not poll(lambda: asked.check([name.text]), time.monotonic() + _IDENTIFY_S):
            return "another job's store"
        proof = asked.get(name.text)
    except (TimeoutError, WorldError, dist.DistError):
        return "something answers that is not a torch store"
    if not hmac.compare_digest(proof, name.proof(port).encode()):
        raise WorldError(
            f"the store at {host}, port {port}, says it is that of run {name.text!r}, and does not have the secret of "
            "this run's ranks: somebody wants to be taken for rank 0, or the machines have different secrets. Set "
            "ALLSTEP_SECRET to the same on all of them, as `openssl rand -hex 16` gives one"
        )
    return store


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
    """The part of the store that is this start's own, and the other process with this rank ("" if there is none)."""
    # The first process to set the key owns the rank; a second one finds the first one's name there.
    base = BoundedStore(PrefixStore(name, client))
    owner = base.compare_set(f"owner/{rank}", "", process).decode()
    if owner == process:
        return base.with_prefix(f"generation/{base.add(f'generation/{rank}', 1)}"), ""
    # The owner may not have counted its generation yet.
    poll(lambda: base.add(f"generation/{rank}", 0) > 0, deadline)
    return base.with_prefix(f"generation/{base.add(f'generation/{rank}', 0)}"), owner


def _service_for_rival(
    store: BoundedStore, placement: Placement, deadline: float, text: str, starts_service: bool
) -> MonitorService:
    """The service at which a second process of a rank registers, so that all ranks are told; else an error, `text`."""
    service = head_service(store, placement, deadline) if starts_service else None
    if service is None:
        raise WorldError(text)
    return service


def _not_found(placement: Placement, timeout: float, what: str) -> str:
    assert placement.rendezvous is not None
    place = placement.rendezvous
    ports = ", ".join(map(str, place.ports))
    return (
        f"rank {placement.rank} of {placement.world_size} (run {placement.run_id!r}, attempt {placement.attempt}) "
        f"did not meet the others at {place.host}, port {ports}, within {timeout:g} s: {what}. Check that rank 0 "
        "runs and calls init, that the host name and port are right, and that no firewall is between"
    )
