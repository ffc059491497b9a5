"""The environment variables that make a process one rank of a job, and the port that they name.

Contract: `worker_environment` is a pure function, tested as text. The names are torchrun's, so that scripts written for
torchrun run unchanged. ALLSTEP_RUN_ID and ALLSTEP_ATTEMPT say that allstep started the process; `allstep.placement`
looks for them first. ALLSTEP_CHANNEL is where the node's monitoring service listens, ALLSTEP_KEY what its ranks
have to have there, and ALLSTEP_ATTEMPT_FOLDER, an absolute path, where this attempt's files are kept, if anywhere.

Whoever starts workers holds a `ReservedPort` while they run and gives its number as MASTER_PORT. The supervisor, the
ranks that `allstep.testing` starts, and tests do so. ALLSTEP_STORE_FD is the descriptor of its socket, in rank 0 where
that has it.
"""

from __future__ import annotations

import socket

from allstep.protocol.address import EVERYWHERE


def worker_environment(
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    master_addr: str,
    master_port: int,
    run_id: str,
    attempt: int = 0,
    max_restarts: int = 0,
    node_rank: int = 0,
    nodes: int = 1,
    channel: str = "",
    key: str = "",
    attempt_folder: str | None = None,
    store_fd: int | None = None,
) -> dict[str, str]:
    """Variables to set for one worker, over whatever environment it inherits."""
    folder = {"ALLSTEP_ATTEMPT_FOLDER": attempt_folder} if attempt_folder is not None else {}
    store = {"ALLSTEP_STORE_FD": str(store_fd)} if store_fd is not None else {}
    return (
        folder
        | store
        | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(local_world_size),
            "GROUP_RANK": str(node_rank),
            "GROUP_WORLD_SIZE": str(nodes),
            "ROLE_NAME": "default",
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": master_addr,
            "MASTER_PORT": str(master_port),
            "TORCHELASTIC_RUN_ID": run_id,
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
            "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 serves the store, not this launcher
            "ALLSTEP_RUN_ID": run_id,
            "ALLSTEP_ATTEMPT": str(attempt),
            "ALLSTEP_CHANNEL": channel,
            "ALLSTEP_KEY": key,
        }
    )


class ReservedPort:
    """A bound TCP port that stays ours until rank 0 serves its store on it.

    The socket is bound and does not listen, so that who connects too early is refused. Nobody else can bind the port:
    the kernel gives its number to nobody who asks for a free one, nor to a process, of whichever user, that asks for it
    by number. So rank 0 is given the socket itself (`fileno`, in ALLSTEP_STORE_FD), and has it listen.

    Args:
        host: the interface; every one by default.
        port: the port; 0 takes any that is free.
        shared: let another process bind the port too, and listen first: for ranks that are not given the socket.

    Raises:
        OSError: the port is in use.
    """

    def __init__(self, host: str = EVERYWHERE, port: int = 0, *, shared: bool = False) -> None:
        both = host == EVERYWHERE and socket.has_dualstack_ipv6()
        try:
            self._socket = _bound(socket.AF_INET6 if both else socket.AF_INET, host, port, shared)
        except OSError:
            if not both:
                raise
            self._socket = _bound(socket.AF_INET, host, port, shared)  # IPv6 may be compiled in and switched off
        self.port: int = self._socket.getsockname()[1]

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _bound(family: socket.AddressFamily, host: str, port: int, shared: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # torch's own stores set SO_REUSEADDR, with which two sockets can be bound to one port, and the first listens.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(shared))
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock
