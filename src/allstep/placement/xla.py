"""A process that torch_xla started for one of this host's devices (`torch_xla.launch`, `xmp.spawn`).

torch_xla tells each such process PJRT_LOCAL_PROCESS_RANK of PJRT_LOCAL_PROCESS_COUNT on its host and, on TPUs,
CLOUD_TPU_TASK_ID over all processes and TPU_PROCESS_ADDRESSES with one address a process, host after host. The names
and the default port are those of torch_xla's `core/xla_env_vars.py`, `_internal/pjrt.py` and `_internal/tpu.py`.
Under torchrun XLA processes are torchrun's, which is asked first.
"""

from __future__ import annotations

from collections.abc import Mapping

from allstep.placement.placement import Placement, Rendezvous
from allstep.placement.variables import agree, fail, index, integer, port, text

DEFAULT_PORT = 12355

_REMEDY = "torch_xla sets it: start the processes with torch_xla.launch or torchrun"


class Xla:
    """One process per XLA device, started by torch_xla itself."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether torch_xla said that this is one of its processes."""
        return "PJRT_LOCAL_PROCESS_RANK" in environ

    def place(self, environ: Mapping[str, str]) -> Placement:
        """The process's place; raises PlacementError."""
        text(environ, "PJRT_DEVICE", _REMEDY)
        local_world_size = integer(environ, "PJRT_LOCAL_PROCESS_COUNT", _REMEDY, least=1)
        local_rank = index(environ, "PJRT_LOCAL_PROCESS_RANK", local_world_size, "PJRT_LOCAL_PROCESS_COUNT", _REMEDY)
        # Without the addresses there is one host.
        rank, world_size, host = local_rank, local_world_size, "127.0.0.1"
        if "TPU_PROCESS_ADDRESSES" in environ:
            addresses = text(environ, "TPU_PROCESS_ADDRESSES", _REMEDY).split(",")
            world_size = len(addresses)
            # Hosts of a pod have equal numbers of devices, so that a remainder means a wrong variable.
            if world_size % local_world_size:
                problem = f"its {world_size} processes do not divide by PJRT_LOCAL_PROCESS_COUNT, {local_world_size}"
                fail(environ, "TPU_PROCESS_ADDRESSES", problem, _REMEDY)
            rank = index(environ, "CLOUD_TPU_TASK_ID", world_size, "the number of TPU_PROCESS_ADDRESSES", _REMEDY)
            if rank % local_world_size != local_rank:
                fail(environ, "CLOUD_TPU_TASK_ID", f"PJRT_LOCAL_PROCESS_RANK is {local_rank}", _REMEDY)
            host = addresses[0].rpartition(":")[0] or fail(
                environ, "TPU_PROCESS_ADDRESSES", "its first address is not HOST:PORT", _REMEDY
            )
        agree(environ, "WORLD_SIZE", world_size, "torch_xla")
        if "MASTER_ADDR" in environ:
            host = text(environ, "MASTER_ADDR", _REMEDY)
        meeting_port = port(environ, "MASTER_PORT", _REMEDY) if "MASTER_PORT" in environ else DEFAULT_PORT
        return Placement(
            launcher="xla",
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            node_rank=rank // local_world_size,
            nodes=world_size // local_world_size,
            rendezvous=Rendezvous(host=host, ports=(meeting_port,)) if world_size > 1 else None,
            run_id=f"{host}:{meeting_port}",
        )
