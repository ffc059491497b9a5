"""The environment variables that make a process one rank of a job: a pure function, tested as text.

The names are torchrun's, so that scripts written for torchrun run unchanged; ALLSTEP_RUN_ID and ALLSTEP_ATTEMPT say
that allstep started the process (`allstep.placement` looks for them first). ALLSTEP_CHANNEL is where the node's service
of the control channel listens, ALLSTEP_NONCE what its ranks show there, and ALLSTEP_ATTEMPT_FOLDER, an absolute path,
where this attempt's files are kept, if anywhere.
"""

from __future__ import annotations


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
    nonce: str = "",
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
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "ALLSTEP_RUN_ID": run_id,
        "ALLSTEP_ATTEMPT": str(attempt),
        "ALLSTEP_CHANNEL": channel,
        "ALLSTEP_NONCE": nonce,
    }
