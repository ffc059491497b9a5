"""Launch settings from a YAML file, checked before anything starts.

Contract: `load_settings` gives the fields that the file sets, as keyword arguments of `LaunchSettings`, or raises
`ConfigurationError` naming the file, the line and the field of every mistake. The only part of the launcher that loads
YAML and pydantic; it is imported when a file is given. Scalars are taken as they are written (an `env` value `on` or
`1e-3` reaches the workers as just that) and get their type from the field.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from allstep.errors import ConfigurationError
from allstep.launch import settings
from allstep.launch.settings import Show


class LaunchConfig(BaseModel):
    """The fields of a configuration file; the meaning of each is in `LaunchSettings`, and so is its default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nproc: Literal["auto"] | int | None = Field(default=None, description="auto, or the number of workers")
    cpu_processes: int | None = Field(default=None, description="workers where no device is visible")
    name: str | None = Field(default=None, description="name of the run and of its folder")
    runs: str | None = Field(default=None, description="folder that holds run folders", min_length=1)
    show: Show | None = Field(default=None, description="all, main, or a list of ranks")
    env: dict[str, str] | None = Field(default=None, description="environment variables for the workers")
    grace: float | None = Field(default=None, description="seconds between a signal to stop and SIGKILL")
    max_restarts: int | None = Field(default=None, description="how often a run that failed is begun anew")
    stop_after: int | None = Field(default=None, description="restarts in a row without progress that are allowed")
    nnodes: int | None = Field(default=None, description="the number of machines")
    node_rank: int | None = Field(default=None, description="which of the machines this is")
    rdzv: str | None = Field(default=None, description="where the machines meet, HOST:PORT")
    rdzv_timeout: float | None = Field(default=None, description="seconds that machines wait for each other")
    limits: str | None = Field(default=None, description="seconds that a section may last, such as step=60,data=300")
    fault: str | None = Field(default=None, description="faults to rehearse, such as rank=1,iteration=7,kill=9")
    resume: str | None = Field(default=None, description="auto, none, or the path of a checkpoint to go on from")
    share_imports: bool | None = Field(default=None, description="false: each worker imports torch by itself")

    @field_validator("nproc", mode="before")
    @classmethod
    def _nproc(cls, value: object) -> object:
        return settings.parse_nproc(value) if isinstance(value, str) else value

    @field_validator("show", mode="before")
    @classmethod
    def _show(cls, value: object) -> object:
        return settings.parse_show(value) if isinstance(value, str) else value

    @field_validator("cpu_processes", "stop_after", "nnodes")
    @classmethod
    def _counts(cls, value: int, info: ValidationInfo) -> int:
        return settings.check_count(str(info.field_name), value)

    @field_validator("max_restarts", "node_rank")
    @classmethod
    def _counts_from_zero(cls, value: int, info: ValidationInfo) -> int:
        return settings.check_count(str(info.field_name), value, least=0)

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return settings.check_name(value)

    @field_validator("env")
    @classmethod
    def _env(cls, value: dict[str, str]) -> Mapping[str, str]:
        return settings.check_env(value)

    @field_validator("grace", "rdzv_timeout")
    @classmethod
    def _seconds(cls, value: float, info: ValidationInfo) -> float:
        return settings.check_seconds(str(info.field_name), value)

    @field_validator("rdzv")
    @classmethod
    def _rdzv(cls, value: str) -> str:
        settings.parse_rdzv(value)
        return value

    @field_validator("limits")
    @classmethod
    def _limits(cls, value: str) -> str:
        return settings.check_limits(value)

    @field_validator("resume")
    @classmethod
    def _resume(cls, value: str) -> str:
        return settings.check_resume(value)

    @field_validator("fault")
    @classmethod
    def _fault(cls, value: str) -> str:
        return settings.check_fault(value)


def load_settings(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Returns:
        The fields that it sets, by their names in `LaunchSettings`.

    Raises:
        ConfigurationError: the file cannot be read, is not YAML, or says something that cannot be meant.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigurationError(f"{path} cannot be read: {reason}") from error
    try:
        tree = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise ConfigurationError(f"{path}:{line}: not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: not YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigurationError(f"{path}:{_line(tree)}: expected fields such as `nproc: auto`, one a line")
    _refuse_duplicates(path, tree)
    try:
        config = LaunchConfig.model_validate(_plain(tree))
    except ValidationError as error:
        raise ConfigurationError("\n".join(_mistakes(path, tree, error))) from error
    return config.model_dump(exclude_unset=True)


def _plain(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {_plain(key): _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each) for each in node.value]
    return node.value


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _refuse_duplicates(path: Path, tree: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, value in tree.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigurationError(f"{path}:{_line(key)}: a field's name must be plain text")
        if key.value in seen:
            raise ConfigurationError(f"{path}:{_line(key)}: {key.value} is set already, in line {seen[key.value]}")
        seen[key.value] = _line(key)
        if isinstance(value, yaml.MappingNode):
            _refuse_duplicates(path, value)


def _mistakes(path: Path, tree: yaml.MappingNode, error: ValidationError) -> list[str]:
    by_field: dict[str, str] = {}
    for each in error.errors():
        field = str(each["loc"][0])
        by_field.setdefault(field, _said(tree, field, each["type"], each["msg"], each["loc"][1:]))
    return [f"{path}:{_line_of(tree, field)}: {said}" for field, said in by_field.items()]


def _said(tree: yaml.MappingNode, field: str, kind: str, message: str, inside: tuple[int | str, ...]) -> str:
    if kind == "extra_forbidden":
        fields = list(LaunchConfig.model_fields)
        near = difflib.get_close_matches(field, fields, n=1)
        return f"{field} is not a field; " + (f"did you mean {near[0]}?" if near else f"fields are {', '.join(fields)}")
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    described = LaunchConfig.model_fields[field].description
    return f"{field}: {message[:1].lower()}{message[1:]}; it is to be {described}"


def _line_of(tree: yaml.MappingNode, field: str) -> int:
    return next(_line(key) for key, _ in tree.value if key.value == field)
