"""The way to the monitoring service that watches over a world's ranks: its address, and starting it where needed.

Contract: under `allstep run` the supervisor serves, at ALLSTEP_CHANNEL. Under any other launcher local rank 0 of each
node starts a sidecar process and says in the ranks' store where it listens. The first node's sidecar is the head, the
others relay to it. Every rank calls `join` before a process group is opened, which registers the rank. It returns when
all ranks have registered and fit together. Where they do not, it raises the same error on all of them: ranks missing,
two processes with one rank, or differences in world size, backend, devices or facts. The error comes as soon as the
last rank has registered.

The service and its ranks prove to each other that they have a key (`protocol.authentication`). The supervisor gives it
to its workers. A sidecar's is derived from what the ranks have in common (`rank_secret`) and a random text in the
store, which everybody can read who reaches it. Where the ranks have nothing in common, the key is as open as the store.

What can go wrong: nothing answers at the address, a sidecar does not start, ranks do not come in time. Each is a
WorldError that says so.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allstep.errors import ConfigurationError, WorldError
from allstep.monitor.client import Client
from allstep.monitor.sidecar import Sidecar, SidecarSetup, start_sidecar
from allstep.placement import Placement
from allstep.placement.slurm import job_of_process
from allstep.protocol.address import EVERYWHERE, HERE, join_address, new_key
from allstep.protocol.authentication import derived_key
from allstep.protocol.connection import connect
from allstep.protocol.foreign_text import one_line
from allstep.protocol.masking import secret_values
from allstep.protocol.messages import RankHello
from allstep.protocol.registration import RankRegistration
from allstep.protocol.user_secret import VARIABLE, user_secret
from allstep.run_record.process_identity import identity_of
from allstep.run_record.recorder import about_run
from allstep.run_record.run_folders import FOLDER
from allstep.world.bounded_store import BoundedStore, poll

_MARGIN_S = 2.0


@dataclass(frozen=True, slots=True)
class MonitorService:
    """Where a rank registers.

    Attributes:
        address: host and port.
        key: the secret of this start, without which the service turns a process away.
        supervised: whether it is the service of the supervisor that started this process.
        sidecar: the process that this rank started for it, if any.
    """

    address: str
    key: str
    supervised: bool = False
    sidecar: Sidecar | None = None

    def release(self) -> None:
        """This rank needs it no more: a sidecar that it started may end once the other ranks have left too."""
        if self.sidecar is not None:
            self.sidecar.release()


def rank_secret(placement: Placement, environ: Mapping[str, str]) -> str:
    """What this rank has in common with the others of its run and with nobody else; empty where there is nothing.

    Under `allstep run` that is the attempt's key. Else it is the user's secret: ALLSTEP_SECRET, or the file at home.
    Machines that torchrun or a person brought together need not share a home, so there the variable alone counts.

    Raises:
        WorldError: the secret is not one.
    """
    if placement.launcher == "allstep":
        return environ.get("ALLSTEP_KEY", "")
    if placement.nodes > 1 and placement.launcher != "slurm" and VARIABLE not in environ:
        return ""
    try:
        return user_secret(environ)
    except ConfigurationError as error:
        raise WorldError(str(error)) from error
    except OSError as error:
        warnings.warn(
            f"the ranks have no secret by which to know each other, so that whoever reaches their store can end the "
            f"run: none can be kept here ({error}); set {VARIABLE} to the same on all of them",
            RuntimeWarning,
            stacklevel=2,
        )
        return ""


def supervised_service(placement: Placement) -> MonitorService | None:
    """The service of the supervisor that started this process; None where there is none."""
    address = os.environ.get("ALLSTEP_CHANNEL")
    if placement.launcher != "allstep" or not address:
        return None
    return MonitorService(address, os.environ.get("ALLSTEP_KEY", ""), supervised=True)


def sidecar_service(store: BoundedStore, placement: Placement, timeout: float, deadline: float) -> MonitorService:
    """The service of this rank's node, started by its local rank 0.

    Args:
        store: of this start of the ranks, not used before.
        placement: of a world of several.
        timeout: what the caller of `init` gave, for the message.
        deadline: when to stop waiting for other ranks, on `time.monotonic`.

    Raises:
        WorldError: the sidecar of this node, or the head's, was not started in time.
        torch.distributed.DistNetworkError: the store went away.
    """
    sidecar: Sidecar | None = None
    secret = rank_secret(placement, os.environ)
    if placement.node_rank:
        store.set(f"node/{placement.node_rank}/{placement.local_rank}", str(placement.rank))
    if placement.local_rank == 0:
        if placement.node_rank == 0:
            salt = new_key()
            sidecar = _start(placement, _service_key(secret, salt))
        else:
            port, salt = _published(store, 0, placement, timeout, deadline)
            assert placement.rendezvous is not None
            ranks = _ranks_of_node(store, placement, deadline)
            upstream = join_address(placement.rendezvous.host, port)
            sidecar = _start(placement, _service_key(secret, salt), upstream=upstream, ranks=ranks)
        store.set(f"service/{placement.node_rank}", f"{sidecar.address.rpartition(':')[2]} {salt}")
    port, salt = _published(store, placement.node_rank, placement, timeout, deadline)
    return MonitorService(join_address(HERE, port), _service_key(secret, salt), sidecar=sidecar)


def head_service(store: BoundedStore, placement: Placement, deadline: float) -> MonitorService | None:
    """The head's service, for a process that must not start one; None where none answers in time."""
    key = "service/0"
    if not poll(lambda: store.check([key]), deadline):
        return None
    port, salt = _read_service(store, key)
    assert placement.rendezvous is not None
    host = placement.rendezvous.host if placement.nodes > 1 else HERE
    service_key = _service_key(rank_secret(placement, os.environ), salt)
    try:
        connect([(host, port)], key=service_key, within=_MARGIN_S, answer=_MARGIN_S, retry=False).close()
    except ConnectionError:
        return None
    return MonitorService(join_address(host, port), service_key)


def join(service: MonitorService, placement: Placement, registration: RankRegistration, timeout: float) -> Client:
    """Register this rank and wait for all others.

    Raises:
        WorldError: the ranks did not all come, or do not fit together.
    """
    hello = RankHello(attempt=placement.attempt, registration=registration)
    return Client.connect(service.address, service.key, hello, timeout)


def _start(placement: Placement, key: str, upstream: str = "", ranks: Sequence[int] = ()) -> Sidecar:
    setup = SidecarSetup(
        key=key,
        attempt=placement.attempt,
        world_size=placement.world_size,
        host=EVERYWHERE if placement.nodes > 1 and not upstream else HERE,
        limits=os.environ.get("ALLSTEP_LIMITS", ""),
        attempt_folder=os.environ.get("ALLSTEP_ATTEMPT_FOLDER", ""),
        upstream=upstream,
        node_rank=placement.node_rank,
        ranks=tuple(ranks),
        nodes=placement.nodes,
        run=placement.run_id,
        secrets=tuple(secret_values(sys.argv[1:], os.environ)),
        about={} if upstream else _about(placement),
        run_folder=os.environ.get(FOLDER),
    )
    return start_sidecar(setup)


def _about(placement: Placement) -> dict[str, Any]:
    """What the run's record says of the run."""
    # Who ends all ranks when it is told to stop: torchrun's agent, which is a rank's parent; else a rank itself, whose
    # StopOnSignal or Preemption stops all of them.
    pid = os.getppid() if placement.launcher == "torchrun" else os.getpid()
    return about_run(
        name="",
        run_id=placement.run_id,
        launcher=placement.launcher,
        command=sys.argv,
        process=identity_of(pid),
        job=job_of_process(os.environ) or "",
    )


def _ranks_of_node(store: BoundedStore, placement: Placement, deadline: float) -> list[int]:
    """The ranks of this node, as each has written into the store: a launcher may have spread them in any order.

    The wait ends a little before the deadline, so that a rank that is missing can still be named.
    """
    keys = [f"node/{placement.node_rank}/{local_rank}" for local_rank in range(placement.local_world_size)]
    poll(lambda: store.check(keys), deadline - _MARGIN_S)
    found = [store.get(key).decode(errors="replace") for key in keys if store.check([key])]
    return [int(rank) for rank in found if rank.isdecimal() and len(rank) < 10]


def _published(
    store: BoundedStore, node: int, placement: Placement, timeout: float, deadline: float
) -> tuple[int, str]:
    key = f"service/{node}"
    if not poll(lambda: store.check([key]), deadline):
        who = "rank 0" if node == 0 else f"local rank 0 of node {node}"
        raise WorldError(
            f"rank {placement.rank} of {placement.world_size} waited {timeout:g} s for {who}, which did not arrive; "
            "check that its process started, can reach the store, and calls init; or give init a longer timeout"
        )
    return _read_service(store, key)


def _read_service(store: BoundedStore, key: str) -> tuple[int, str]:
    """The port of a service and the text that its key is derived from; anybody may have written them."""
    port, _, salt = store.get(key).decode(errors="replace").partition(" ")
    if not port.isdecimal() or not 0 < int(port[:6]) < 65536:
        raise WorldError(f"the ranks' store has no port of a service at {key}, but {one_line(port)!r}")
    return int(port), salt


def _service_key(secret: str, salt: str) -> str:
    return derived_key(secret, "service", salt)
