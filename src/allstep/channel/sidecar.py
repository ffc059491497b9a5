"""The service of ranks that no supervisor started: a small process of its own, so that a frozen rank cannot silence it.

Contract: `start_sidecar` is called by one rank of each node. It starts this file by its path in a session of its own,
with nothing on its standard streams, and returns when the service listens. The caller holds the write end of the
sidecar's lifeline until its process ends. The sidecar ends when its lifeline has closed and no rank of its node is
connected any more. After a verdict it orders the ranks to leave, has the lowest living rank print the report, writes
`failure.json` where an attempt folder is known, and kills those of its node that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A started sidecar: where its ranks connect, and the process."""

    address: str
    pid: int


def start_sidecar(
    *,
    nonce: str,
    attempt: int,
    world_size: int,
    host: str = "127.0.0.1",
    limits: str = "",
    attempt_folder: str = "",
    upstream: str = "",
    node_rank: int = 0,
    ranks: Sequence[int] = (),
    run: str = "",
    timeout: float = 10.0,
) -> Sidecar:
    """Start a sidecar on this node.

    Args:
        nonce: the secret that its ranks, and relays, have to know.
        attempt: the present start's number.
        world_size: how many ranks the whole world has.
        host: the address to listen on: 127.0.0.1, or the one that other nodes reach this one by.
        limits: as in ALLSTEP_LIMITS.
        attempt_folder: where failure.json goes; empty: nowhere.
        upstream: HOST:PORT of the head's service, which makes this one a relay; empty: this is the head.
        node_rank: of this node.
        ranks: of this node, for a relay.
        run: the run's name, for the report.
        timeout: seconds that it has to start.

    Raises:
        WorldError: it did not start.
    """
    raise NotImplementedError
