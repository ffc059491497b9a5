"""What a person asked of a launch, as a value: the one place where the defaults are.

Contract: the command line, and a configuration file through `allstep.launch.config`, each give the fields that were
set; `LaunchSettings(**file | command_line)` is what holds. Everything after reads only this. Standard library only, so
that a run without a configuration file loads neither YAML nor pydantic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from allstep.errors import ConfigurationError
from allstep.launch.environment import worker_environment

Show = Literal["all", "main"] | tuple[int, ...]

RESERVED = frozenset(
    worker_environment(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        master_addr="",
        master_port=0,
        run_id="",
        attempt_folder="",
    )
)
"""Variables that the launcher sets itself for each worker."""


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """How to launch.

    Args:
        nproc: workers on this machine; "auto" is one per visible CUDA device.
        cpu_processes: workers that "auto" means where no device is visible.
        name: the run's name, which is its folder's name in `runs`; None makes one of script and time.
        runs: the folder that holds run folders; None is `runs` in the current folder, done without if not writable.
        show: whose output goes to the terminal: "all", "main" (rank 0), or the ranks named.
        env: variables for the workers, over the inherited environment.
        grace: seconds that workers have to leave after a signal to stop, before SIGKILL.
        max_restarts: how often a run that failed is begun anew.
        stop_after: restarts in a row that get no further than the attempts before, after which it is not.
        nnodes: machines of the run; with `node_rank` and `rdzv`, or all three None for this machine alone or SLURM's.
        node_rank: which of them this is.
        rdzv: where node 0 waits for the others, as HOST:PORT.
        rdzv_timeout: seconds that the machines wait for each other.
        limits: seconds that a section of the training may last, as ALLSTEP_LIMITS has it; None is the environment's.
        fault: faults to rehearse, as ALLSTEP_FAULT has them; None is the environment's.
        resume: the checkpoint that scripts go on from: "auto" for the newest, a path, or "none"; None is the
            environment's ALLSTEP_RESUME.
        share_imports: workers that begin with the same imports, torch above all, import once and are forked then.

    Raises:
        ConfigurationError: a value cannot be meant.
    """

    nproc: int | Literal["auto"] = "auto"
    cpu_processes: int = 1
    name: str | None = None
    runs: str | None = None
    show: Show = "all"
    env: Mapping[str, str] = field(default_factory=dict)
    grace: float = 30.0
    max_restarts: int = 0
    stop_after: int = 3
    nnodes: int | None = None
    node_rank: int | None = None
    rdzv: str | None = None
    rdzv_timeout: float = 300.0
    limits: str | None = None
    fault: str | None = None
    resume: str | None = None
    share_imports: bool = True

    def __post_init__(self) -> None:
        if self.nproc != "auto":
            check_count("nproc", self.nproc)
        check_count("cpu_processes", self.cpu_processes)
        if self.name is not None:
            check_name(self.name)
        check_env(self.env)
        check_seconds("grace", self.grace)
        check_count("max_restarts", self.max_restarts, least=0)
        check_count("stop_after", self.stop_after)
        if self.nnodes is not None:
            check_count("nnodes", self.nnodes)
        if self.node_rank is not None:
            check_count("node_rank", self.node_rank, least=0)
        if self.rdzv is not None:
            parse_rdzv(self.rdzv)
        check_seconds("rdzv_timeout", self.rdzv_timeout)
        if self.limits is not None:
            check_limits(self.limits)
        if self.fault is not None:
            check_fault(self.fault)
        if self.resume is not None:
            check_resume(self.resume)


def check_count(field_name: str, value: int, *, least: int = 1) -> int:
    """Give `value` back if it can be a number of things, else raise ConfigurationError."""
    if value < least:
        raise ConfigurationError(f"{field_name} is {value}; it must be {least} or more")
    return value


def check_name(value: str) -> str:
    """Give `value` back if it can be a run's name, else raise ConfigurationError."""
    if not re.fullmatch(r"[\w.+=@,-]+", value) or value.startswith((".", "-")):
        raise ConfigurationError(
            f"name is {value!r}; it becomes a folder's name, so it may have letters, digits and _ . + = @ , - "
            "and must not begin with . or -"
        )
    return value


def check_env(value: Mapping[str, str]) -> Mapping[str, str]:
    """Give `value` back if it can be passed to the workers, else raise ConfigurationError."""
    for name, content in value.items():
        if not name or "=" in name or "\0" in name + content:
            raise ConfigurationError(f"env has {name!r}: {content!r}, which cannot be an environment variable")
        if name in RESERVED:
            raise ConfigurationError(
                f"env sets {name} to {content!r}; the launcher sets {name} itself, so leave it out"
            )
    return value


def check_seconds(field_name: str, value: float) -> float:
    """Give `value` back if it can be a number of seconds to wait, else raise ConfigurationError."""
    if not 0 <= value < 1e6:
        raise ConfigurationError(f"{field_name} is {value}; it is seconds, at least 0 and less than 1000000")
    return value


def check_resume(text: str) -> str:
    """Give `text` back if it can say what to resume from, else raise ConfigurationError."""
    if not text.strip():
        raise ConfigurationError("resume is empty; it must be auto, none, or the path of a checkpoint")
    return text


def check_limits(text: str) -> str:
    """Give `text` back if it says how long sections may last, else raise ConfigurationError."""
    from allstep.diagnosis.hang import Limits

    Limits.parse(text)
    return text


def check_fault(text: str) -> str:
    """Give `text` back if it is a fault plan, else raise ConfigurationError."""
    from allstep.faults import FaultPlan

    FaultPlan.parse(text)
    return text


def parse_rdzv(text: str) -> tuple[str, int]:
    """Read `HOST:PORT` (an IPv6 address in brackets); raises ConfigurationError."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or re.search(r"\s", host) or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ConfigurationError(
            f"rdzv is {text!r}; it must be HOST:PORT, the machine of node rank 0 and a port from 1 to 65535 that is "
            "free there"
        )
    return host, int(port)


def parse_nproc(text: str) -> int | Literal["auto"]:
    """Read `auto` or a number of workers; raises ConfigurationError."""
    if text == "auto":
        return "auto"
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise ConfigurationError(f"nproc is {text!r}; it must be auto or a number of workers, 1 or more")
    return check_count("nproc", int(text))


def parse_show(text: str) -> Show:
    """Read `all`, `main`, or ranks separated by commas; raises ConfigurationError."""
    if text == "all":
        return "all"
    if text == "main":
        return "main"
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text):
        raise ConfigurationError(f"show is {text!r}; it must be all, main, or ranks such as 0,3")
    return tuple(int(rank) for rank in text.split(","))


def parse_variable(text: str) -> tuple[str, str]:
    """Read `NAME=VALUE`; raises ConfigurationError."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigurationError(f"env is {text!r}; it must be NAME=VALUE")
    check_env({name: value})
    return name, value


def shown_ranks(show: Show, world_size: int) -> frozenset[int]:
    """Return the ranks whose output goes to the terminal; raises ConfigurationError for a rank that will not exist."""
    if show == "all":
        return frozenset(range(world_size))
    ranks = frozenset((0,) if show == "main" else show)
    if absent := sorted(rank for rank in ranks if rank >= world_size):
        raise ConfigurationError(
            f"show names rank {absent[0]}, but this run has {world_size} worker{'s' if world_size > 1 else ''}: "
            f"ranks 0 to {world_size - 1}"
        )
    return ranks
