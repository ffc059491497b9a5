"""A SLURM step: this process was started by `srun`, and the STEP variables say so.

Only they can be trusted. A batch script has SLURM_PROCID, an salloc shell SLURM_NTASKS, and `srun -n1 -N1` in a job
of two nodes still shows the job's node list and tasks per node. The STEP variables have one weakness: a batch script
that is submitted from inside a step inherits that step's, which the checks against its own job uncover.
"""

from __future__ import annotations

from collections.abc import Mapping

from allstep.placement.derived_port import derive_ports
from allstep.placement.hostlist import MalformedList, expand_hosts, expand_tasks_per_node
from allstep.placement.placement import Placement, Rendezvous
from allstep.placement.variables import agree, fail, index, integer, port, text

# SLURM numbers the steps that nobody's srun asked for from here: interactive (salloc's shell), batch and extern.
FIRST_SPECIAL_STEP = 4294967290

_REMEDY = "srun sets it: start the script with srun, or unset the SLURM_STEP_* variables to run it alone"
_LEAKED = (
    "The SLURM_STEP_* variables were inherited from another step: start the script with srun, or submit the job with"
    " `sbatch --export=NONE`"
)


class SlurmStep:
    """A task of a step that `srun` started."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether STEP variables are there, and not those of the step that an salloc shell may itself be."""
        if "SLURM_STEP_NUM_TASKS" not in environ and "SLURM_STEP_NODELIST" not in environ:
            return False
        return not is_special_step(environ)

    def place(self, environ: Mapping[str, str]) -> Placement:
        """The task's place; raises PlacementError. Several ports are derived, since srun reserves none."""
        job = integer(environ, "SLURM_JOB_ID", _REMEDY)
        step = integer(environ, "SLURM_STEP_ID", _REMEDY)
        attempt = integer(environ, "SLURM_RESTART_COUNT", _REMEDY) if "SLURM_RESTART_COUNT" in environ else 0
        world_size = integer(environ, "SLURM_STEP_NUM_TASKS", _REMEDY, least=1)
        rank = index(environ, "SLURM_PROCID", world_size, "SLURM_STEP_NUM_TASKS", _REMEDY)
        hosts, tasks = _nodes(environ, world_size)
        node_rank = index(environ, "SLURM_NODEID", len(hosts), "the number of nodes in SLURM_STEP_NODELIST", _REMEDY)
        counted = f"the tasks on node {node_rank} in SLURM_STEP_TASKS_PER_NODE"
        local_rank = index(environ, "SLURM_LOCALID", tasks[node_rank], counted, _REMEDY)
        _check_not_inherited(environ, hosts, rank, local_rank, tasks[node_rank])
        agree(environ, "WORLD_SIZE", world_size, "SLURM_STEP_NUM_TASKS")
        agree(environ, "LOCAL_RANK", local_rank, "SLURM_LOCALID")
        agree(environ, "LOCAL_WORLD_SIZE", tasks[node_rank], "SLURM_STEP_TASKS_PER_NODE")
        return Placement(
            launcher="slurm",
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=tasks[node_rank],
            node_rank=node_rank,
            nodes=len(hosts),
            rendezvous=_rendezvous(environ, hosts, f"slurm {job}.{step} {attempt}") if world_size > 1 else None,
            run_id=f"{job}.{step}",
            attempt=attempt,
        )


def is_special_step(environ: Mapping[str, str]) -> bool:
    """Whether SLURM_STEP_ID is one that SLURM gives to a shell or script of its own, not to an srun."""
    step = environ.get("SLURM_STEP_ID", "")
    return len(step) == 10 and step.isascii() and step.isdecimal() and int(step) >= FIRST_SPECIAL_STEP


def _nodes(environ: Mapping[str, str], world_size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    try:
        hosts = expand_hosts(text(environ, "SLURM_STEP_NODELIST", _REMEDY))
    except MalformedList as error:
        fail(environ, "SLURM_STEP_NODELIST", str(error), _REMEDY)
    try:
        tasks = expand_tasks_per_node(text(environ, "SLURM_STEP_TASKS_PER_NODE", _REMEDY))
    except MalformedList as error:
        fail(environ, "SLURM_STEP_TASKS_PER_NODE", str(error), _REMEDY)
    if len(tasks) != len(hosts):
        problem = f"it speaks of {len(tasks)} nodes, but SLURM_STEP_NODELIST of {len(hosts)}"
        fail(environ, "SLURM_STEP_TASKS_PER_NODE", problem, _REMEDY)
    if sum(tasks) != world_size:
        problem = f"that is {sum(tasks)} tasks, but SLURM_STEP_NUM_TASKS is {world_size}"
        fail(environ, "SLURM_STEP_TASKS_PER_NODE", problem, _REMEDY)
    if "SLURM_STEP_NUM_NODES" in environ and integer(environ, "SLURM_STEP_NUM_NODES", _REMEDY) != len(hosts):
        fail(environ, "SLURM_STEP_NUM_NODES", f"SLURM_STEP_NODELIST has {len(hosts)} nodes", _REMEDY)
    return hosts, tasks


def _check_not_inherited(
    environ: Mapping[str, str], hosts: tuple[str, ...], rank: int, local_rank: int, local_world_size: int
) -> None:
    if "SLURM_JOB_NODELIST" in environ:
        try:
            of_job = set(expand_hosts(text(environ, "SLURM_JOB_NODELIST", _REMEDY)))
        except MalformedList as error:
            fail(environ, "SLURM_JOB_NODELIST", str(error), _REMEDY)
        if not of_job.issuperset(hosts):
            problem = f"the job has only the nodes {environ['SLURM_JOB_NODELIST']}"
            fail(environ, "SLURM_STEP_NODELIST", problem, _LEAKED)
    if "SLURM_GTIDS" in environ:
        on_node = environ["SLURM_GTIDS"].split(",")
        if len(on_node) != local_world_size or on_node[local_rank] != str(rank):
            problem = (
                f"SLURM_GTIDS, the tasks on this node, is {environ['SLURM_GTIDS']!r}, where {local_world_size} are"
                f" expected, the one at SLURM_LOCALID ({local_rank}) being SLURM_PROCID ({rank})"
            )
            fail(environ, "SLURM_STEP_TASKS_PER_NODE", problem, _LEAKED)


def _rendezvous(environ: Mapping[str, str], hosts: tuple[str, ...], job: str) -> Rendezvous:
    """MASTER_ADDR and MASTER_PORT where set; else the step's first node, or this machine when it is the only one."""
    remedy = "Correct it, or unset it to have it derived from the step"
    host = hosts[0] if len(hosts) > 1 else "127.0.0.1"
    if "MASTER_ADDR" in environ:
        host = text(environ, "MASTER_ADDR", remedy)
    ports = (port(environ, "MASTER_PORT", remedy),) if "MASTER_PORT" in environ else derive_ports(job)
    return Rendezvous(host=host, ports=ports)
