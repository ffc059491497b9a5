"""SLURM: a process that `srun` started, or one inside a job that it did not start.

- `SlurmStep`: a task of a step. Only the STEP variables can be trusted: a batch script has SLURM_PROCID, an salloc
  shell SLURM_NTASKS, and `srun -n1 -N1` in a job of two nodes still shows the job's node list and tasks per node. The
  STEP variables have one weakness: a batch script that is submitted from inside a step inherits that step's. The
  checks against its own job uncover that.
- `SlurmShell`: a batch script, or the shell that salloc gives. Either is one process, whatever the job asked for, so it
  is a world of one.

SLURM writes hosts and counts in short forms, which are expanded here without calling out. A host list is names
separated by commas. A bracket group in a name stands for several: numbers and ranges separated by commas, with the
width of a zero-padded number kept. A name may have several groups, the first one turning slowest. The grammar is that
of SLURM's `scontrol show hostnames`.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Mapping

from allstep.errors import ArgumentError
from allstep.placement.placement import Placement, Rendezvous, derive_ports
from allstep.placement.variables import agree, fail, index, integer, port, text

MOST_HOSTS = 1_000_000
"""More than any cluster has; a list that expands to more is refused before it takes the memory."""

_NAME = re.compile(r"(?:[^\[\],\s]|\[[0-9,-]+\])+\Z")
_GROUP = re.compile(r"\[([0-9,-]+)\]")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?\Z")
_REPEATED = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?\Z")

# SLURM numbers the steps that nobody's srun asked for from here: interactive (salloc's shell), batch and extern.
FIRST_SPECIAL_STEP = 4294967290

_STEP_REMEDY = "srun sets it: start the script with srun, or unset the SLURM_STEP_* variables to run it alone"
_SHELL_REMEDY = "SLURM sets it: start the script with srun, or unset SLURM_JOB_ID to run outside any job"
_INHERITED_REMEDY = (
    "The SLURM_STEP_* variables were inherited from another step: start the script with srun, or submit the job with"
    " `sbatch --export=NONE`"
)


class SlurmStep:
    """A task of a step that `srun` started."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether STEP variables are there, and not those of the step that an salloc shell may itself be."""
        if "SLURM_STEP_NUM_TASKS" not in environ and "SLURM_STEP_NODELIST" not in environ:
            return False
        return not is_special_step(environ)  # else the shell of salloc would be a task among many

    def place(self, environ: Mapping[str, str]) -> Placement:
        """The task's place; raises PlacementError. Several ports are derived, since srun reserves none."""
        job = integer(environ, "SLURM_JOB_ID", _STEP_REMEDY)
        step = integer(environ, "SLURM_STEP_ID", _STEP_REMEDY)
        attempt = integer(environ, "SLURM_RESTART_COUNT", _STEP_REMEDY) if "SLURM_RESTART_COUNT" in environ else 0
        world_size = integer(environ, "SLURM_STEP_NUM_TASKS", _STEP_REMEDY, least=1)
        rank = index(environ, "SLURM_PROCID", world_size, "SLURM_STEP_NUM_TASKS", _STEP_REMEDY)
        hosts, tasks = _nodes(environ, world_size)
        node_rank = index(
            environ, "SLURM_NODEID", len(hosts), "the number of nodes in SLURM_STEP_NODELIST", _STEP_REMEDY
        )
        counted = f"the tasks on node {node_rank} in SLURM_STEP_TASKS_PER_NODE"
        local_rank = index(environ, "SLURM_LOCALID", tasks[node_rank], counted, _STEP_REMEDY)
        _check_not_inherited(environ, hosts, rank, local_rank, tasks[node_rank])
        # Variables for torch that were exported before srun are the same in every task.
        agree(environ, "WORLD_SIZE", world_size, "SLURM_STEP_NUM_TASKS")
        agree(environ, "LOCAL_RANK", local_rank, "SLURM_LOCALID")
        agree(environ, "LOCAL_WORLD_SIZE", tasks[node_rank], "SLURM_STEP_TASKS_PER_NODE")
        # Node 0 is everywhere the one with rank 0, which serves the others.
        first = _first_node(environ, hosts) if world_size > 1 else 0
        return Placement(
            launcher="slurm",
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=tasks[node_rank],
            node_rank=(node_rank - first) % len(hosts),
            nodes=len(hosts),
            rendezvous=_rendezvous(environ, hosts, f"slurm {job}.{step} {attempt}") if world_size > 1 else None,
            run_id=f"{job}.{step}",
            attempt=attempt,
        )


def job_of_process(environ: Mapping[str, str]) -> str | None:
    """This process' SLURM job as SLURM's commands know it alone; None outside SLURM.

    Of a member of an array that is ARRAY_MEMBER: one of them has the array's own number, which means all of them.
    """
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    job = environ.get("SLURM_JOB_ID")
    return f"{array}_{task}" if job and array and task else job or None


def requeue_command(environ: Mapping[str, str]) -> list[str] | None:
    """What puts this process' SLURM job back into its queue; None outside SLURM."""
    job = job_of_process(environ)
    return None if job is None else ["scontrol", "requeue", job]


def is_special_step(environ: Mapping[str, str]) -> bool:
    """Whether SLURM_STEP_ID is one that SLURM gives to a shell or script of its own, not to an srun."""
    step = environ.get("SLURM_STEP_ID", "")
    # Compared by length first: int() of a text of any length takes time.
    return len(step) == 10 and step.isascii() and step.isdecimal() and int(step) >= FIRST_SPECIAL_STEP


def _nodes(environ: Mapping[str, str], world_size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    try:
        hosts = expand_hosts(text(environ, "SLURM_STEP_NODELIST", _STEP_REMEDY))
    except ArgumentError as error:
        fail(environ, "SLURM_STEP_NODELIST", str(error), _STEP_REMEDY)
    try:
        tasks = expand_tasks_per_node(text(environ, "SLURM_STEP_TASKS_PER_NODE", _STEP_REMEDY))
    except ArgumentError as error:
        fail(environ, "SLURM_STEP_TASKS_PER_NODE", str(error), _STEP_REMEDY)
    if len(tasks) != len(hosts):
        problem = f"it speaks of {len(tasks)} nodes, but SLURM_STEP_NODELIST of {len(hosts)}"
        fail(environ, "SLURM_STEP_TASKS_PER_NODE", problem, _STEP_REMEDY)
    if sum(tasks) != world_size:
        problem = f"that is {sum(tasks)} tasks, but SLURM_STEP_NUM_TASKS is {world_size}"
        fail(environ, "SLURM_STEP_TASKS_PER_NODE", problem, _STEP_REMEDY)
    if "SLURM_STEP_NUM_NODES" in environ and integer(environ, "SLURM_STEP_NUM_NODES", _STEP_REMEDY) != len(hosts):
        fail(environ, "SLURM_STEP_NUM_NODES", f"SLURM_STEP_NODELIST has {len(hosts)} nodes", _STEP_REMEDY)
    return hosts, tasks


def _check_not_inherited(
    environ: Mapping[str, str], hosts: tuple[str, ...], rank: int, local_rank: int, local_world_size: int
) -> None:
    if "SLURM_JOB_NODELIST" in environ:
        try:
            of_job = set(expand_hosts(text(environ, "SLURM_JOB_NODELIST", _STEP_REMEDY)))
        except ArgumentError as error:
            fail(environ, "SLURM_JOB_NODELIST", str(error), _STEP_REMEDY)
        if not of_job.issuperset(hosts):
            problem = f"the job has only the nodes {environ['SLURM_JOB_NODELIST']}"
            fail(environ, "SLURM_STEP_NODELIST", problem, _INHERITED_REMEDY)
    # A step on nodes that the job happens to have may still be another's: the tasks on this node tell.
    if "SLURM_GTIDS" in environ:
        on_node = environ["SLURM_GTIDS"].split(",")
        if len(on_node) != local_world_size or on_node[local_rank] != str(rank):
            problem = (
                f"SLURM_GTIDS, the tasks on this node, is {environ['SLURM_GTIDS']!r}, where {local_world_size} are"
                f" expected, the one at SLURM_LOCALID ({local_rank}) being SLURM_PROCID ({rank})"
            )
            fail(environ, "SLURM_STEP_TASKS_PER_NODE", problem, _INHERITED_REMEDY)


def _rendezvous(environ: Mapping[str, str], hosts: tuple[str, ...], job: str) -> Rendezvous:
    """MASTER_ADDR and MASTER_PORT where set; else the node of rank 0, or this machine when it is the only one."""
    remedy = "Correct it, or unset it to have it derived from the step"
    host = hosts[_first_node(environ, hosts)] if len(hosts) > 1 else "127.0.0.1"
    if "MASTER_ADDR" in environ:
        host = text(environ, "MASTER_ADDR", remedy)
    ports = (port(environ, "MASTER_PORT", remedy),) if "MASTER_PORT" in environ else derive_ports(job)
    return Rendezvous(host=host, ports=ports)


def _first_node(environ: Mapping[str, str], hosts: tuple[str, ...]) -> int:
    """Which of the step's nodes has rank 0: the first, unless the user said where each task runs.

    Raises PlacementError where that is not known.
    """
    if environ.get("SLURM_DISTRIBUTION") != "arbitrary" or len(hosts) == 1:
        return 0
    listed = environ.get("SLURM_ARBITRARY_NODELIST", "")
    if not listed and "SLURM_HOSTFILE" in environ:
        with contextlib.suppress(OSError, UnicodeError), open(environ["SLURM_HOSTFILE"], encoding="utf-8") as file:
            listed = next((line.split()[0] for line in file if line.strip() and not line.startswith("#")), "")
    named: list[str] = []
    for names in filter(None, (listed, environ.get("MASTER_ADDR", ""))):
        with contextlib.suppress(ArgumentError):
            named += [host for host in expand_hosts(names)[:1] if host in hosts]
    if not named:
        problem = "tasks were put on nodes one by one, so rank 0 need not be on the first, and nothing says where it is"
        fail(
            environ, "SLURM_DISTRIBUTION", problem, "Set MASTER_ADDR to the name that SLURM has for the node of rank 0"
        )
    return hosts.index(named[0])


class SlurmShell:
    """The one process that SLURM's job script or interactive shell starts by itself."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether there is a job, and no step or only the one that salloc's shell is."""
        return "SLURM_JOB_ID" in environ and ("SLURM_STEP_NUM_TASKS" not in environ or is_special_step(environ))

    def place(self, environ: Mapping[str, str]) -> Placement:
        """A world of one, with a warning where the job asked for more; raises PlacementError."""
        asked = [  # of processes that srun would start
            f"{variable}={count}"
            for variable in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES")
            if variable in environ and (count := integer(environ, variable, _SHELL_REMEDY, least=1)) > 1
        ]
        warning = (
            f"the job asked for more ({', '.join(asked)}), but this process was not started by srun and trains alone;"
            " start the script with srun to use them all"
        )
        return Placement(
            launcher="alone",
            run_id=text(environ, "SLURM_JOB_ID", _SHELL_REMEDY),
            attempt=integer(environ, "SLURM_RESTART_COUNT", _SHELL_REMEDY) if "SLURM_RESTART_COUNT" in environ else 0,
            warnings=(warning,) if asked else (),
        )


def expand_hosts(hosts: str) -> tuple[str, ...]:
    """Expand such as `rack[1-2]-n[03-05,7],gpu9` to its names, in order. Raises ArgumentError."""
    expanded: list[str] = []
    for name in _split_outside_brackets(hosts):
        if not _NAME.match(name):
            raise ArgumentError(f"{name!r} in the host list {hosts!r} is not a host name with bracket groups")
        # split() with a group in the pattern gives text and bracket groups in turn.
        parts = [
            (part,) if position % 2 == 0 else _expand_group(part, hosts, MOST_HOSTS - len(expanded))
            for position, part in enumerate(_GROUP.split(name))
        ]
        total = 1  # counted before anything is expanded
        for part in parts:
            total *= len(part)
        if len(expanded) + total > MOST_HOSTS:
            raise ArgumentError(f"the host list {hosts!r} names more than {MOST_HOSTS} hosts")
        expanded += map("".join, itertools.product(*parts))
    return tuple(expanded)


def expand_tasks_per_node(tasks: str) -> tuple[int, ...]:
    """Expand such as `4(x2),1` to (4, 4, 1). Raises ArgumentError."""
    expanded: list[int] = []
    for item in tasks.split(","):
        match = _REPEATED.match(item)
        if match is None:
            raise ArgumentError(f"{item!r} in {tasks!r} is not a count such as 4 or 4(x2)")
        count, times = int(match[1]), int(match[2] or 1)
        if count < 1 or times < 1:
            raise ArgumentError(f"{item!r} in {tasks!r} counts nothing")
        if len(expanded) + times > MOST_HOSTS:
            raise ArgumentError(f"{tasks!r} counts more than {MOST_HOSTS} nodes")
        expanded += [count] * times
    return tuple(expanded)


def _split_outside_brackets(hosts: str) -> list[str]:
    names, depth, start = [], 0, 0
    for position, character in enumerate(hosts):
        if character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
        elif character == "," and depth == 0:
            names.append(hosts[start:position])
            start = position + 1
        if depth not in (0, 1):
            raise ArgumentError(f"the brackets of the host list {hosts!r} do not pair")
    if depth:
        raise ArgumentError(f"the brackets of the host list {hosts!r} do not pair")
    return [*names, hosts[start:]]


def _expand_group(group: str, hosts: str, most: int) -> tuple[str, ...]:
    numbers: list[str] = []  # as texts, since 05 and 5 are different hosts
    for item in group.split(","):
        match = _RANGE.match(item)
        if match is None:
            raise ArgumentError(f"{item!r} in the host list {hosts!r} is not a number or a range such as 03-05")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise ArgumentError(f"the range {item!r} in the host list {hosts!r} runs backwards")
        if len(numbers) + int(last) - int(first) >= most:
            raise ArgumentError(f"the host list {hosts!r} names more than {MOST_HOSTS} hosts")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return tuple(numbers)
