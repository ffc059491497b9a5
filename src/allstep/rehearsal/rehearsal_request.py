"""What a rehearsal is asked to be: a value that is checked when it is made. Standard library only.

Contract: each field but the script's own has one `Option` in `OPTIONS`, read and checked as those of `allstep run` are
(`allstep.launch.settings`). `allstep rehearse` and `allstep.testing.rehearse` make a `RehearsalRequest`; nothing has
been started then. A value that cannot be meant is a ConfigurationError that names it, its value and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from allstep.errors import ConfigurationError, LaunchError
from allstep.launch.settings import (
    Option,
    ValueType,
    check_count,
    check_env,
    check_mesh,
    check_not_empty,
    check_seconds,
    check_switch,
    read_integer,
    read_seconds,
    read_switch,
    read_variable,
)
from allstep.rehearsal.interruption import KILL_WAIT_S, KINDS, Kind
from allstep.submission.lead_time import MARGIN_S
from allstep.suggestions import did_you_mean


def _read_text(name: str, text: str) -> str:
    return text


def _read_folder(name: str, text: str) -> Path:
    check_not_empty(name, text)
    return Path(text)


def _check_iterations(name: str, value: int) -> None:
    check_count(name, value, least=2)


def _check_rank(name: str, value: int) -> None:
    check_count(name, value, least=0)


def _check_folder(name: str, value: Path) -> None:
    check_not_empty(name, str(value))


_COUNT = ValueType(read_integer, check_count)
_SECONDS = ValueType(read_seconds, check_seconds)
_FOLDER = ValueType(_read_folder, _check_folder)

OPTIONS = (
    Option("ranks", _COUNT, "N", "processes of the run", "--ranks", "2"),
    Option("then_ranks", _COUNT, "N", "processes after the interruption", "--then-ranks", "as many as before"),
    Option(
        "iterations",
        ValueType(read_integer, _check_iterations),
        "N",
        "after which the run is stopped and compared",
        "--iterations",
        "20",
    ),
    Option("at", _COUNT, "N", "the iteration after which it is interrupted", "--at", "half of --iterations"),
    Option(
        "rank", ValueType(read_integer, _check_rank), "R", "with failure, the rank that is killed", "--rank", "the last"
    ),
    Option(
        "lead",
        _SECONDS,
        "SECONDS",
        "from the notice to the job's end",
        "--lead",
        f"what a save was measured to take, and {MARGIN_S:g}",
    ),
    Option("kill_wait", _SECONDS, "SECONDS", "from SIGTERM to SIGKILL", "--kill-wait", f"{KILL_WAIT_S:g}, as SLURM's"),
    Option("timeout", _SECONDS, "SECONDS", "how long each start may take", "--timeout", "600"),
    Option("device", ValueType(_read_text, check_not_empty), "TYPE", "what ranks compute on", "--device", "cpu"),
    Option("mesh", ValueType(_read_text, check_mesh), "NAME=N,...", "of the ranks, as for allstep run", "--mesh"),
    Option("env", ValueType(read_variable, check_env, form="mapping"), "NAME=VALUE", "a variable for ranks", "--env"),
    Option("runs", _FOLDER, "DIR", "where the rehearsal's folder is made", "--runs", "runs"),
    Option("workdir", _FOLDER, "DIR", "where the script works", "--workdir", "here"),
    Option(
        "keep",
        ValueType(read_switch, check_switch),
        "",
        "keep the rehearsal's folder also where all is well",
        "--keep",
        constant=True,
    ),
)
"""Every option of `allstep rehearse`, in the order of the help."""


@dataclass(frozen=True, slots=True)
class RehearsalRequest:
    """How to rehearse.

    Args:
        kind: "preemption", "requeue", "failure" or "time-limit"; see `allstep.rehearsal.interruption`.
        target: the script's path, or a module's name.
        arguments: the script's own.
        module: whether the target is a module.
        ranks: processes of the run.
        then_ranks: processes after the interruption; by default as many.
        iterations: after which the run is stopped and compared. Where the interruption comes late it is moved on.
        at: the iteration after which the interruption comes; by default half of `iterations`.
        rank: which rank fails; by default the last.
        lead: seconds from the notice to the end; by default what the measured save takes, and a margin.
        kill_wait: seconds from SIGTERM to SIGKILL.
        device: where the ranks compute.
        mesh: of the ranks, as for `allstep run`.
        env: variables for the ranks.
        runs: the folder in which that of the rehearsal is made.
        workdir: where the script works; by default here.
        keep: keep the folder also where there is nothing to look for in it.
        timeout: seconds for each start.

    Raises:
        ConfigurationError: a value is out of range.
        LaunchError: the script is not there.
    """

    kind: Kind
    target: str
    arguments: tuple[str, ...] = ()
    module: bool = False
    ranks: int = 2
    then_ranks: int | None = None
    iterations: int = 20
    at: int | None = None
    rank: int | None = None
    lead: float | None = None
    kill_wait: float = KILL_WAIT_S
    device: str = "cpu"
    mesh: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    runs: Path = Path("runs")
    workdir: Path | None = None
    keep: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = did_you_mean(str(self.kind), KINDS)
            raise ConfigurationError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}{near}")
        for option in OPTIONS:
            if (value := getattr(self, option.name)) is not None:
                option.type.check(option.name, value)
        if self.at is not None and self.at >= self.iterations:
            raise ConfigurationError(
                f"at is {self.at}, and the run is compared after {self.iterations} iterations; the interruption has to "
                f"come before: give at most {self.iterations - 1}, or more iterations"
            )
        if self.rank is not None and self.rank >= self.ranks:
            raise ConfigurationError(f"rank is {self.rank}, and the ranks are 0 to {self.ranks - 1}")
        if not self.module and not Path(self.target).exists():
            raise LaunchError(f"script {self.target} does not exist (in {Path.cwd()}); for a module use -m")
        if self.workdir is not None and not self.workdir.is_dir():
            raise LaunchError(f"workdir {self.workdir} is no folder (in {Path.cwd()})")

    @property
    def script(self) -> str:
        """What to start: the target, wherever the script works."""
        return self.target if self.module or self.workdir is None else str(Path(self.target).absolute())

    @property
    def interrupted_after(self) -> int:
        """The iteration after which the interruption comes."""
        return self.at or math.ceil(self.iterations / 2)

    @property
    def failing_rank(self) -> int:
        """Which rank fails."""
        return self.ranks - 1 if self.rank is None else self.rank

    @property
    def ranks_after(self) -> int:
        """How many ranks there are after the interruption."""
        return self.then_ranks or self.ranks
