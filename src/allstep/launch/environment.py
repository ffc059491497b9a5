"""The environment variables that make a process one rank of a job, and the port that they name.

Contract: `worker_environment` is a pure function, tested as text. The names are torchrun's, so that scripts written for
torchrun run unchanged. ALLSTEP_RUN_ID and ALLSTEP_ATTEMPT say that allstep started the process; `allstep.placement`
looks for them first. ALLSTEP_CHANNEL is where the node's monitoring service listens, ALLSTEP_KEY what its ranks
have to have there, and ALLSTEP_ATTEMPT_FOLDER, an absolute path, where this attempt's files are kept, if anywhere.

Whoever starts workers holds a `ReservedPort` while they run and gives its number as MASTER_PORT. The supervisor, the
ranks that `allstep.testing` starts, and tests do so.
"""

from __future__ import annotations

import socket


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
) -> dict[str, str]:
    """Variables to set for one worker, over whatever environment it inherits."""
    folder = {"ALLSTEP_ATTEMPT_FOLDER": attempt_folder} if attempt_folder is not None else {}
    return folder | {
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


class ReservedPort:
    """A bound TCP port that stays ours until rank 0 serves its store on it.

    The socket is bound and never listens. So the kernel gives the number to nobody who asks for a free port, while rank
    0's store, which sets SO_REUSEADDR as torch's always does, may bind it and listen. Choosing a port, closing the
    socket and hoping would leave a gap in which another job takes it.

    Args:
        host: the interface; every one by default.
        port: the port; 0 takes any that is free.

    Raises:
        OSError: the port is in use.
    """

    def __init__(self, host: str = "", port: int = 0) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
