"""The settings of a launch: one table that the command line, the configuration file and the documentation read.

Contract: each field of `LaunchSettings` carries one `Option`: how its text is read, what it may be, what it is for.
- `allstep.cli` builds its argument parser from `OPTIONS` and `COMMAND_LINE_ONLY`.
- `allstep.launch.config_file` reads a YAML file by `OPTIONS`.
- `options_table` is the table in the documentation.
- `LaunchSettings(**from_file | from_command_line)` is what holds, with the defaults that stand here and nowhere else.
Everything after this reads the `LaunchSettings` only. What can go wrong is a ConfigurationError that names the field,
its value and what is allowed. Standard library only, so that a run without a configuration file loads no YAML.

To add a setting, add a field to `LaunchSettings`; nothing else has to know of it but the code that uses it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from allstep.errors import ConfigurationError, MeshError
from allstep.launch.environment import worker_environment
from allstep.protocol.masking import masked_value
from allstep.protocol.user_secret import VARIABLE as SECRET

Show = Literal["all", "main"] | tuple[int, ...]
"""Whose output goes to the terminal: all ranks, rank 0, or the ranks named."""

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
        store_fd=0,
    )
)
"""Variables that the launcher sets itself for each worker."""


@dataclass(frozen=True, slots=True)
class ValueType:
    """A type of value that settings have.

    Args:
        read: turns the text of a command line or file into the value; called with the field's name and the text.
        check: called with the field's name and a value; raises ConfigurationError where it is out of range.
        form: how a file may write the value besides as one text: a list of texts, or names with texts.
    """

    read: Callable[[str, str], Any]
    check: Callable[[str, Any], object]
    form: Literal["text", "list", "mapping"] = "text"


@dataclass(frozen=True, slots=True)
class Option:
    """One setting, as a person gives it.

    Args:
        name: the field of `LaunchSettings` and of a configuration file.
        type: how its value is read and checked.
        metavar: what stands for the value in the help.
        help: what the setting is for, in one sentence without a full stop.
        flag: the command line's option; empty where only a file can set it.
        default: the default in words; empty where there is none.
        constant: the value that the flag alone gives, for an option without a value; None where it takes one.
    """

    name: str
    type: ValueType
    metavar: str
    help: str
    flag: str
    default: str = ""
    constant: bool | None = None

    def value(self, text: str) -> Any:
        """Return the value that a text means; raises ConfigurationError."""
        value = self.type.read(self.name, text)
        self.type.check(self.name, value)
        return value


def read_integer(name: str, text: str) -> int:
    """Read an integer in decimal digits; raises ConfigurationError."""
    # int() would read "1_000" and digits of other scripts too.
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", text):
        raise ConfigurationError(f"{name} is {text!r}; it must be an integer")
    return int(text)


def check_count(name: str, value: int, *, least: int = 1) -> int:
    """Give `value` back if it can be a number of things, else raise ConfigurationError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigurationError(f"{name} is {value!r}; it must be an integer")
    if value < least:
        raise ConfigurationError(f"{name} is {value}; it must be {least} or more")
    return value


def read_nproc(name: str, text: str) -> int | Literal["auto"]:
    """Read `auto` or a number of workers; raises ConfigurationError."""
    if text == "auto":
        return "auto"
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise ConfigurationError(f"{name} is {text!r}; it must be auto or a number of workers, 1 or more")
    return int(text)


def check_nproc(name: str, value: int | Literal["auto"]) -> None:
    """Raise ConfigurationError unless `value` can be a number of workers."""
    if value != "auto":
        check_count(name, value)


def read_seconds(name: str, text: str) -> float:
    """Read a number of seconds; raises ConfigurationError."""
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"{name} is {text!r}; it must be a number of seconds") from None


def check_seconds(name: str, value: float) -> None:
    """Raise ConfigurationError unless `value` can be a number of seconds to wait."""
    # Not a number, and what poll cannot wait for, are refused by the same comparison.
    if not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise ConfigurationError(f"{name} is {value!r}; it is seconds, at least 0 and less than 1000000")


def check_switch(name: str, value: bool) -> None:
    """Raise ConfigurationError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} is {value!r}; it must be True or False")


def read_switch(name: str, text: str) -> bool:
    """Read what YAML has for yes and no; raises ConfigurationError."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise ConfigurationError(f"{name} is {text!r}; it must be true or false")


def read_show(name: str, text: str) -> Show:
    """Read `all`, `main`, or ranks separated by commas; raises ConfigurationError."""
    if text == "all":
        return "all"
    if text == "main":
        return "main"
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text):
        raise ConfigurationError(f"{name} is {text!r}; it must be all, main, or ranks such as 0,3")
    return tuple(int(rank) for rank in text.split(","))


def check_show(name: str, value: Show) -> None:
    """Raise ConfigurationError unless `value` says whose output to show."""
    if value in ("all", "main"):
        return
    if not isinstance(value, tuple) or not value or not all(isinstance(rank, int) and rank >= 0 for rank in value):
        raise ConfigurationError(f"{name} is {value!r}; it must be 'all', 'main', or a tuple of ranks such as (0, 3)")


def read_variable(name: str, text: str) -> dict[str, str]:
    """Read `NAME=VALUE`; raises ConfigurationError."""
    variable, equals, value = text.partition("=")
    if not equals:
        raise ConfigurationError(f"{name} is {text!r}; it must be NAME=VALUE")
    return {variable: value}


def check_env(name: str, value: Mapping[str, str]) -> None:
    """Raise ConfigurationError unless `value` can be passed to the workers."""
    for variable, content in value.items():
        if not variable or "=" in variable or "\0" in variable + content:
            shown = masked_value(variable, content)
            raise ConfigurationError(f"{name} has {variable!r}: {shown!r}, which cannot be an environment variable")
        if variable == SECRET:
            raise ConfigurationError(
                f"{name} sets {variable}, which workers are not to have; set it for allstep run itself"
            )
        if variable in RESERVED:  # set for each worker afterwards, so that a value here would silently be lost
            raise ConfigurationError(
                f"{name} sets {variable} to {content!r}; the launcher sets {variable} itself, so leave it out"
            )


def check_run_name(name: str, value: str) -> None:
    """Raise ConfigurationError unless `value` can be a run's name."""
    if not isinstance(value, str) or not re.fullmatch(r"[\w.+=@,-]+", value) or value.startswith((".", "-")):
        raise ConfigurationError(
            f"{name} is {value!r}; it becomes a folder's name, so it may have letters, digits and _ . + = @ , - "
            "and must not begin with . or -"
        )


def check_not_empty(name: str, value: str) -> None:
    """Raise ConfigurationError where `value` says nothing."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"{name} is {value!r}; it must be a text that is not empty")


def parse_rdzv(text: str) -> tuple[str, int]:
    """Read `HOST:PORT` (an IPv6 address in brackets); raises ConfigurationError."""
    host, _, port = text.rpartition(":")  # the last, since an IPv6 address has colons of its own
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # an IPv6 address without brackets: whether its last group is the port cannot be told
    if not host or re.search(r"\s", host) or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ConfigurationError(
            f"rdzv is {text!r}; it must be HOST:PORT, the machine of node rank 0 and a port from 1 to 65535 that is "
            "free there"
        )
    return host, int(port)


def check_rdzv(name: str, value: str) -> None:
    """Raise ConfigurationError unless `value` is HOST:PORT."""
    parse_rdzv(value)


def check_limits(name: str, value: str) -> None:
    """Raise ConfigurationError unless `value` says how long sections may last."""
    from allstep.diagnosis.hang import HangLimits

    HangLimits.parse(value)


def check_fault(name: str, value: str) -> None:
    """Raise ConfigurationError unless `value` is a fault plan."""
    from allstep.faults import FaultPlan  # most runs rehearse nothing, and need not load it

    FaultPlan.parse(value)


def check_mesh(name: str, value: str) -> None:
    """Raise ConfigurationError unless `value` names a mesh, such as replicate=2,shard=4."""
    from allstep.placement import parse_mesh

    try:
        parse_mesh(value)
    except MeshError as error:
        raise ConfigurationError(str(error)) from None


# Values that are text already.
def _read_text(name: str, text: str) -> str:
    return text


def _check_count_from_zero(name: str, value: int) -> None:
    check_count(name, value, least=0)


_NPROC = ValueType(read_nproc, check_nproc)
_COUNT = ValueType(read_integer, check_count)
_COUNT_FROM_ZERO = ValueType(read_integer, _check_count_from_zero)
_SECONDS = ValueType(read_seconds, check_seconds)
_SWITCH = ValueType(read_switch, check_switch)
_SHOW = ValueType(read_show, check_show, form="list")
_ENV = ValueType(read_variable, check_env, form="mapping")
_NAME = ValueType(_read_text, check_run_name)
_TEXT = ValueType(_read_text, check_not_empty)
_RDZV = ValueType(_read_text, check_rdzv)
_LIMITS = ValueType(_read_text, check_limits)
_FAULT = ValueType(_read_text, check_fault)
_MESH = ValueType(_read_text, check_mesh, form="list")


def _option(
    value: Any,
    value_type: ValueType,
    metavar: str,
    help_text: str,
    *,
    default: str | None = None,
    flag: str | None = None,
    constant: bool | None = None,
) -> Any:
    """A field with this value by default, and what becomes its `Option`; the value in words follows from the value."""
    metadata = {
        "type": value_type,
        "metavar": metavar,
        "help": help_text,
        "flag": flag,
        "default": _in_words(value) if default is None else default,
        "constant": constant,
    }
    if isinstance(value, dict):  # one dictionary of its own for each LaunchSettings
        return field(default_factory=dict, metadata=metadata)
    return field(default=value, metadata=metadata)


def _in_words(default: object) -> str:
    match default:
        case None | {}:
            return ""
        case bool():
            return str(default).lower()
        case float():
            return f"{default:g}"
    return str(default)


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """How to launch; what each field means is in its option's help, and `options_table` shows all.

    Fields that are None by default leave the choice to the launcher, or to the environment of the workers.

    Raises:
        ConfigurationError: a value is out of range.
    """

    nproc: int | Literal["auto"] = _option(
        "auto", _NPROC, "auto|N", "workers on this machine; auto is one for each visible device"
    )
    device: str | None = _option(
        None, _TEXT, "TYPE", "what workers compute on, such as xla or cpu; a script's own device= comes before it"
    )
    cpu_processes: int = _option(1, _COUNT, "N", "workers that auto means where no device is visible", flag="")
    name: str | None = _option(
        None, _NAME, "NAME", "name of the run and of its folder", default="from the script and the time"
    )
    runs: str | None = _option(None, _TEXT, "DIR", "folder that holds run folders", default="runs")
    show: Show = _option(  # noqa: RUF009 (a field, for dataclasses)
        "all", _SHOW, "all|main|R,R", "whose output to print: all ranks, rank 0 (main), or those named; logs keep all"
    )
    env: Mapping[str, str] = _option(
        {}, _ENV, "NAME=VALUE", "an environment variable for the workers; may be given several times"
    )
    grace: float = _option(30.0, _SECONDS, "SECONDS", "how long workers may take to leave after a signal to stop")
    max_restarts: int = _option(0, _COUNT_FROM_ZERO, "N", "begin a run that failed anew, at most N times")
    stop_after: int = _option(
        3, _COUNT, "K", "restarts in a row that got no further than those before, after which no other follows"
    )
    nnodes: int | None = _option(None, _COUNT, "N", "machines of the run; start the same command on each of them")
    node_rank: int | None = _option(None, _COUNT_FROM_ZERO, "K", "which machine this is, from 0 (a pod: its index)")
    rdzv: str | None = _option(
        None, _RDZV, "HOST:PORT", "where the machines meet: the host of node 0, and a port that is free there"
    )
    rdzv_timeout: float = _option(300.0, _SECONDS, "SECONDS", "how long the machines wait for each other")
    mesh: str | None = _option(
        None, _MESH, "NAME=N,...", "which ranks share a model or a batch, such as replicate=2,shard=4; see Meshes"
    )
    preflight: bool = _option(
        False,
        _SWITCH,
        "true|false",
        "before training, find out whether machines, the ways between them and devices are fit, and name what is not",
        constant=True,
    )
    exclude_ill: int = _option(
        0, _COUNT_FROM_ZERO, "N", "with --preflight, go on without machines that are ill, at most N"
    )
    limits: str | None = _option(
        None, _LIMITS, "TEXT", "seconds that a section may last without progress, such as step=60,data=300"
    )
    fault: str | None = _option(None, _FAULT, "TEXT", "rehearse a fault, such as rank=1,iteration=7,kill=9")
    debug_rank: int | None = _option(
        None,
        _COUNT_FROM_ZERO,
        "R",
        "give rank R of this machine the terminal, for breakpoint() and pdb; nothing is limited in time then",
    )
    resume: str | None = _option(
        None,
        _TEXT,
        "auto|PATH|none",
        "what a script's Checkpoint goes on from: its newest (auto), the one at PATH, or nothing (none)",
        default="auto",
    )
    take_over: bool = _option(
        False,
        _SWITCH,
        "true|false",
        "save to a folder of checkpoints also where another job that is alive owns it, which then saves no more",
        constant=True,
    )
    share_imports: bool = _option(
        True,
        _SWITCH,
        "true|false",
        "let each worker import torch by itself, rather than fork them from one process that has",
        flag="--no-shared-imports",
        constant=False,
    )

    def __post_init__(self) -> None:
        for option in OPTIONS:  # values that a program gives are checked as those of a person are
            value = getattr(self, option.name)
            if value is not None:
                option.type.check(option.name, value)
        if self.exclude_ill and not self.preflight:
            raise ConfigurationError(f"exclude_ill is {self.exclude_ill}, and no preflight says who is; add preflight")


def _options() -> tuple[Option, ...]:
    """The options of the fields; a flag that is not given follows from the field's name."""
    flags = {each.name: each.metadata["flag"] for each in fields(LaunchSettings)}
    flags = {name: f"--{name.replace('_', '-')}" if flag is None else flag for name, flag in flags.items()}
    return tuple(Option(each.name, **{**each.metadata, "flag": flags[each.name]}) for each in fields(LaunchSettings))


OPTIONS = _options()
"""Every setting, in the order in which help and documentation show them."""

COMMAND_LINE_ONLY = (
    Option("module", _SWITCH, "", "script is the name of a module, as in python -m", "-m", constant=True),
    Option("config", _TEXT, "FILE", "YAML file with these settings; the command line wins over it", "--config"),
)
"""Options of the command line that say what to run and where the other settings are."""


def options_table(options: Sequence[Option] = (*COMMAND_LINE_ONLY, *OPTIONS)) -> str:
    """Return the table of these options, by default all of them, as Markdown for the documentation."""
    rows = ["| Command line | Field in a file | Default | Meaning |", "|---|---|---|---|"]
    for option in options:
        command_line, in_file = option.flag, "" if option in COMMAND_LINE_ONLY else option.name
        if option.constant is None:
            command_line += f" {option.metavar}" if option.flag else ""
        elif in_file:  # an option without a value stands for one value of the field
            in_file += f": {str(option.constant).lower()}"
        cells = (_code(command_line), _code(in_file), option.default, option.help[:1].upper() + option.help[1:])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


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
