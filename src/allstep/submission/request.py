"""What a job is asked to be: the options of `allstep submit`, from the command line or the `submit` part of a file.

Contract: each field of `JobRequest` has one `Option` in `OPTIONS`, read as those of `allstep run` are
(`allstep.launch.settings`). A value that cannot be meant is a ConfigurationError that names it. What SLURM alone can
judge, such as a partition's name, goes to SLURM as it is. Pure; imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from allstep.errors import ConfigurationError
from allstep.launch.settings import (
    Option,
    ValueType,
    check_count,
    check_not_empty,
    check_run_name,
    check_seconds,
    check_switch,
    read_integer,
    read_seconds,
    read_switch,
)
from allstep.submission.lead_time import MARGIN_S
from allstep.suggestions import did_you_mean

OWN_SBATCH_OPTIONS = {
    "nodes": "--nodes",
    "N": "--nodes",
    "ntasks-per-node": "--tasks-per-node",
    "ntasks": "--tasks-per-node",
    "n": "--tasks-per-node",
    "gpus-per-node": "--gpus-per-node",
    "gpus": "--gpus",
    "G": "--gpus",
    "gpus-per-task": "--gpus-per-task",
    "ntasks-per-gpu": "--tasks-per-gpu",
    "cpus-per-task": "--cpus-per-task",
    "c": "--cpus-per-task",
    "time": "--time",
    "t": "--time",
    "partition": "--partition",
    "p": "--partition",
    "array": "--array",
    "a": "--array",
    "job-name": "--name",
    "J": "--name",
    "chdir": "--chdir",
    "D": "--chdir",
    "export": "--env",
    "export-file": "--env",
    "output": "--runs",
    "o": "--runs",
    "error": "--runs",
    "e": "--runs",
}
"""Options of sbatch that `allstep submit` sets itself, and what to give it instead."""

NOT_FOR_A_JOB = {"signal", "open-mode", "requeue", "no-requeue", "wrap", "parsable", "wait", "W", "test-only"}
"""Options of sbatch that would take a job's stopping and requeueing away, or that are not about a job."""

_OPTIONS_OF_SHELL = {
    "SBATCH_ACCOUNT": ("--account", "-A"),
    "SBATCH_QOS": ("--qos", "-q"),
    "SBATCH_CONSTRAINT": ("--constraint", "-C"),
    "SBATCH_RESERVATION": ("--reservation",),
    "SBATCH_CLUSTERS": ("--clusters", "-M"),
    "SBATCH_EXCLUSIVE": ("--exclusive",),
    "SBATCH_MEM_PER_NODE": ("--mem", "--mem-per-cpu", "--mem-per-gpu"),
    "SBATCH_MEM_PER_CPU": ("--mem-per-cpu", "--mem-per-gpu", "--mem"),
    "SBATCH_MEM_PER_GPU": ("--mem-per-gpu", "--mem", "--mem-per-cpu"),
}
"""Variables of sbatch, with the option that each stands for, and others that say the same."""

# The forms that `man sbatch` gives for --time.
_TIME = re.compile(r"\d{1,9}(:\d{1,2}(:\d{1,2})?)?|\d{1,6}-\d{1,2}(:\d{1,2}(:\d{1,2})?)?|UNLIMITED|INFINITE", re.I)
_ARRAY = re.compile(r"\d{1,9}(-\d{1,9}(:\d{1,9})?)?(,\d{1,9}(-\d{1,9}(:\d{1,9})?)?)*(%\d{1,9})?")
_NODES = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_JOB = re.compile(r"[0-9]{1,10}(_[0-9]{1,9})?")
_GPUS = re.compile(r"([A-Za-z][\w.-]*:)?[0-9]{1,4}")


def check_nodes(name: str, value: str) -> None:
    """Raise ConfigurationError unless `value` is a number of nodes, or the least and the most."""
    found = _NODES.fullmatch(value)
    if found is None or int(found[1]) < 1 or (found[2] is not None and int(found[2]) < int(found[1])):
        raise ConfigurationError(f"{name} is {value!r}; it must be a number such as 4, or the least and most: 2-4")


def check_time(name: str, value: str) -> None:
    """Raise ConfigurationError unless `value` is a time limit as sbatch reads one."""
    if not _TIME.fullmatch(value):
        raise ConfigurationError(
            f"{name} is {value!r}; it must be minutes, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, or "
            "DAYS-HOURS:MINUTES[:SECONDS], such as 12:00:00"
        )


def check_array(name: str, value: str) -> None:
    """Raise ConfigurationError unless `value` lists the members of an array."""
    if not _ARRAY.fullmatch(value):
        raise ConfigurationError(f"{name} is {value!r}; it must be numbers and ranges such as 0-7, 1,3,5 or 0-99%4")


def check_gpus(name: str, value: str) -> None:
    """Raise ConfigurationError unless `value` says how many GPUs."""
    if not _GPUS.fullmatch(value):
        raise ConfigurationError(f"{name} is {value!r}; it must be a number, or TYPE:NUMBER such as a100:4")


def check_jobs(name: str, value: tuple[str, ...]) -> None:
    """Raise ConfigurationError unless `value` names jobs."""
    for job in value:
        if not _JOB.fullmatch(job):
            raise ConfigurationError(
                f"{name} is {job!r}; it must be a job's number, such as 4711 or 4711_3; for other kinds of dependency "
                "say --sbatch --dependency=..."
            )


def check_sbatch(name: str, value: tuple[str, ...]) -> None:
    """Raise ConfigurationError unless `value` are options that sbatch may be given besides."""
    for option in value:
        found = re.fullmatch(r"--?([A-Za-z][\w-]*)(=?.*)", option, re.S)
        if found is None or not option.isprintable():
            raise ConfigurationError(f"{name} is {option!r}; it must be one option of sbatch, such as --account=lab")
        bare = found[1] if option.startswith("--") else found[1][:1]
        if bare in OWN_SBATCH_OPTIONS:
            raise ConfigurationError(f"{name} is {option!r}; give allstep submit {OWN_SBATCH_OPTIONS[bare]} instead")
        if bare in NOT_FOR_A_JOB:
            raise ConfigurationError(
                f"{name} is {option!r}, which decides how the job is stopped and started; leave it out: allstep submit "
                "sets it"
            )


def check_submitted_env(name: str, value: tuple[str, ...]) -> None:
    """Raise ConfigurationError unless `value` are names of variables, or NAME=VALUE."""
    for each in value:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", each.partition("=")[0]) or "\0" in each:
            raise ConfigurationError(f"{name} is {each!r}; it must be NAME, to take it from here, or NAME=VALUE")


def _words(check: object) -> ValueType:
    def read(name: str, text: str) -> tuple[str, ...]:
        return (text,)

    return ValueType(read, check, form="list")  # type: ignore[arg-type]


def _read_text(name: str, text: str) -> str:
    return text


def _text(check: object) -> ValueType:
    return ValueType(_read_text, check)  # type: ignore[arg-type]


def _check_plain(name: str, value: str) -> None:
    check_not_empty(name, value)
    if not value.isprintable():
        raise ConfigurationError(f"{name} is {value!r}; a line of a batch script cannot hold that")


_COUNT = ValueType(read_integer, check_count)
_SWITCH = ValueType(read_switch, check_switch)
_SECONDS = ValueType(read_seconds, check_seconds)

OPTIONS = (
    Option("nodes", _text(check_nodes), "N|N-M", "nodes, or the least and the most of them", "--nodes", "1"),
    Option("gpus_per_node", _text(check_gpus), "G", "GPUs of each node, one worker each", "--gpus-per-node"),
    Option("gpus", _text(check_gpus), "G", "GPUs of all nodes, whose numbers may differ", "--gpus"),
    Option(
        "tasks_per_node",
        _COUNT,
        "T",
        "start the script itself, a task for each rank, instead of one `allstep run` on each node",
        "--tasks-per-node",
    ),
    Option("gpus_per_task", _text(check_gpus), "G", "GPUs of each task, which sees no others", "--gpus-per-task"),
    Option(
        "tasks_per_gpu",
        _COUNT,
        "T",
        "start the script itself, T tasks for each GPU, of which each sees its own",
        "--tasks-per-gpu",
    ),
    Option("cpus_per_task", _COUNT, "C", "cores of each task, so of a whole node's workers", "--cpus-per-task"),
    Option("time", _text(check_time), "TIME", "the job's time, such as 12:00:00", "--time", "the partition's"),
    Option("partition", _text(_check_plain), "NAME", "where it runs", "--partition", "the cluster's"),
    Option("array", _text(check_array), "LIST", "one job for each number, such as 0-7", "--array"),
    Option("after", _words(check_jobs), "JOB", "begin when this job has ended well; several times", "--after"),
    Option(
        "name", _text(check_run_name), "NAME", "name of the job, the run and its folder", "--name", "as allstep run"
    ),
    Option("runs", _text(_check_plain), "DIR", "folder that holds run folders, shared by the nodes", "--runs", "runs"),
    Option("chdir", _text(_check_plain), "DIR", "folder to work in", "--chdir", "this one; a member's own in an array"),
    Option("live", _SWITCH, "", "run the files as they are when the job starts, not a copy", "--live", "", True),
    Option("chain", _SWITCH, "", "go on in a new job, where a site permits no requeueing", "--chain", "", True),
    Option(
        "margin",
        _SECONDS,
        "SECONDS",
        "time between the job's last save and its end, besides what saves take",
        "--margin",
        f"{MARGIN_S:g}",
    ),
    Option("env", _words(check_submitted_env), "NAME[=VALUE]", "a variable for the job; several times", "--env"),
    Option("sbatch", _words(check_sbatch), "OPTION", "any other option of sbatch; several times", "--sbatch"),
)
"""Every option of `allstep submit` that a file may have too, in the order of the help."""


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a job is asked to be; each field is the option of its name.

    Raises:
        ConfigurationError: a value is out of range, or two of them cannot be meant together.
    """

    nodes: str = "1"
    gpus_per_node: str | None = None
    gpus: str | None = None
    tasks_per_node: int | None = None
    gpus_per_task: str | None = None
    tasks_per_gpu: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    array: str | None = None
    after: tuple[str, ...] = ()
    name: str | None = None
    runs: str = "runs"
    chdir: str | None = None
    live: bool = False
    chain: bool = False
    margin: float = MARGIN_S
    env: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value = getattr(self, option.name)
            if value is not None:
                option.type.check(option.name, value)
        if self.after and any(re.match(r"--dependency|-d", option) for option in self.sbatch):
            raise ConfigurationError("after and sbatch both give a dependency; give all of it as --sbatch --dependency")
        self._check_gpus()

    @property
    def most_nodes(self) -> int:
        """How many nodes the job may have."""
        return int(self.nodes.rpartition("-")[2])

    @property
    def is_range(self) -> bool:
        """Whether the number of nodes may differ from start to start."""
        return "-" in self.nodes

    @property
    def runs_script(self) -> str | None:
        """The option that has srun start the script itself; None where it starts one `allstep run` on each node."""
        if self.tasks_per_gpu is not None:
            return "--tasks-per-gpu"
        return None if self.tasks_per_node is None else "--tasks-per-node"

    def _check_gpus(self) -> None:
        """Raise ConfigurationError where two options say how many GPUs or tasks there are."""
        counts = [name for name in ("gpus_per_node", "gpus", "gpus_per_task") if getattr(self, name) is not None]
        if len(counts) > 1:
            raise ConfigurationError(f"{counts[0]} and {counts[1]} both say how many GPUs there are; leave one out")
        if self.tasks_per_gpu is not None:
            if self.tasks_per_node is not None:
                raise ConfigurationError("tasks_per_gpu and tasks_per_node both say how many tasks; leave one out")
            # Of a number for all nodes SLURM may give one more GPUs than another, and yet as many tasks.
            if self.gpus_per_node is None:
                raise ConfigurationError(
                    "tasks_per_gpu needs the number of a node's GPUs; give --gpus-per-node besides"
                )
        by_number = "tasks_per_gpu" if self.tasks_per_gpu is not None else "gpus_per_task"
        if self.is_range and getattr(self, by_number) is not None:
            raise ConfigurationError(
                f"nodes is {self.nodes!r}, and SLURM knows no {by_number} for a range; give --gpus-per-node, and "
                "--tasks-per-node for a task a rank"
            )


def with_shell_defaults(request: JobRequest, environ: Mapping[str, str]) -> JobRequest:
    """The request with what a person or site has set for every sbatch of this shell, so that the batch script says it.

    Args:
        request: what was asked for, which wins.
        environ: of the shell; sbatch would let its SBATCH_ variables win over the script.

    Raises:
        ConfigurationError: a variable cannot be meant.
    """
    asked = {re.split("[= ]", option)[0] if option.startswith("--") else option[:2] for option in request.sbatch}
    options = tuple(
        names[0] + (f"={environ[name]}" if environ[name] else "")
        for name, names in _OPTIONS_OF_SHELL.items()
        if name in environ and asked.isdisjoint(names)
    )
    return replace(
        request,
        partition=request.partition or environ.get("SBATCH_PARTITION") or None,
        time=request.time or environ.get("SBATCH_TIMELIMIT") or None,
        sbatch=(*request.sbatch, *options),
    )


def request_from_mapping(section: Mapping[str, object], where: str) -> dict[str, object]:
    """The fields that the `submit` part of a file sets; raises ConfigurationError.

    Args:
        section: names with texts, or with lists of texts.
        where: the file, for messages.
    """
    options = {option.name: option for option in OPTIONS}
    found: dict[str, object] = {}
    for name, value in section.items():
        option = options.get(name)
        if option is None:
            raise ConfigurationError(f"{where}: submit.{name} is not a field{did_you_mean(name, list(options))}")
        if isinstance(value, str):
            found[name] = option.value(value)
        elif isinstance(value, list) and option.type.form == "list" and all(isinstance(each, str) for each in value):
            found[name] = tuple(value)
            option.type.check(name, found[name])
        else:
            raise ConfigurationError(f"{where}: submit.{name} must be one value: {option.help}")
    return found
