"""Launch settings from a YAML file, checked before anything starts.

Contract: `load_settings` gives the fields that the file sets, as keyword arguments of `LaunchSettings`, or raises one
ConfigurationError that names the file, the line and the field of every mistake. What fields there are, and what each
may be, is in the table of `allstep.launch.settings`. YAML is loaded here only, so that a run without a file does
without it.

A file that is too large, too deep, or says things by reference (`&name`, `*name`) is refused before it is read as a
tree: with references a few lines can stand for more than any memory holds.

Scalars are taken as they are written and get their type from their field. YAML's own types would turn a value of `env`
such as `on`, `1e-3` or `010` into something else than the text that a person wants the workers to have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from allstep.errors import ConfigurationError
from allstep.launch.settings import OPTIONS, Option
from allstep.suggestions import did_you_mean

LARGEST = 1 << 20
"""Bytes of a file, at most."""

DEEPEST = 16
"""Levels of lists and mappings, at most."""


OTHER_SECTIONS = ("submit",)
"""Fields of a file that belong to other commands, of which one may be said in the same file."""


def load_settings(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Returns:
        The fields that it sets, by their names in `LaunchSettings`.

    Raises:
        ConfigurationError: the file cannot be read, is not YAML, or has a field or value that is not allowed.
    """
    tree = _compose(path)
    if tree is None:
        return {}
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigurationError(f"{path}:{_line(tree)}: expected fields such as `nproc: auto`, one a line")
    _refuse_duplicates(path, tree)
    options = {option.name: option for option in OPTIONS}
    settings: dict[str, Any] = {}
    mistakes: list[str] = []
    for key, node in tree.value:
        if key.value in OTHER_SECTIONS:
            continue
        try:
            # A key's line, not its value's: that is where a person looks.
            option = options.get(key.value) or _refuse_unknown(key.value)
            settings[option.name] = _value(option, node)
        except ConfigurationError as error:  # all mistakes are shown at once
            mistakes.append(f"{path}:{_line(key)}: {error}")
    if mistakes:
        raise ConfigurationError("\n".join(mistakes))
    return settings


def load_section(path: Path, name: str) -> dict[str, Any]:
    """Read the part of a configuration file that belongs to another command.

    Returns:
        Its names, with texts or lists of texts; empty where the file has no such part.

    Raises:
        ConfigurationError: the file cannot be read, is not YAML, or the part is no mapping.
    """
    tree = _compose(path)
    if not isinstance(tree, yaml.MappingNode):
        return {}
    _refuse_duplicates(path, tree)
    for key, node in tree.value:
        if key.value == name:
            if not isinstance(node, yaml.MappingNode):
                raise ConfigurationError(f"{path}:{_line(key)}: {name} must be names with values, one a line")
            return {each.value: _plain(path, each, value) for each, value in node.value}
    return {}


def _plain(path: Path, key: yaml.Node, node: yaml.Node) -> str | list[str]:
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    if isinstance(node, yaml.SequenceNode) and all(isinstance(each, yaml.ScalarNode) for each in node.value):
        return [str(each.value) for each in node.value]
    raise ConfigurationError(f"{path}:{_line(key)}: {key.value} must be one value or a list")


def _compose(path: Path) -> yaml.Node | None:
    """The file as a tree whose nodes know their lines, or None for a file without content."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigurationError(f"{path} cannot be read: {reason}") from error
    if len(content) > LARGEST:
        raise ConfigurationError(f"{path} has more than {LARGEST} bytes, which no file of settings has")
    try:
        _refuse_what_multiplies(path, text)
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise ConfigurationError(f"{path}:{line}: not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: not YAML: {error}") from error


def _refuse_what_multiplies(path: Path, text: str) -> None:
    """Raise where a file is nested deeper than settings are, or says something by reference."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        line = event.start_mark.line + 1 if event.start_mark is not None else 1
        if isinstance(event, yaml.AliasEvent):
            raise ConfigurationError(f"{path}:{line}: write the value out; *{event.anchor} is not followed")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ConfigurationError(f"{path}:{line}: nested deeper than settings are")


def _refuse_duplicates(path: Path, tree: yaml.MappingNode) -> None:
    """Raise where a field is given twice, of which YAML would silently keep the last."""
    seen: dict[str, int] = {}
    for key, value in tree.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigurationError(f"{path}:{_line(key)}: a field's name must be plain text")
        if key.value in seen:
            raise ConfigurationError(f"{path}:{_line(key)}: {key.value} is set already, in line {seen[key.value]}")
        seen[key.value] = _line(key)
        if isinstance(value, yaml.MappingNode):
            _refuse_duplicates(path, value)


def _refuse_unknown(field: str) -> Option:
    names = [option.name for option in OPTIONS]
    # One suggestion where a name is nearly right; else all, since a person is then looking for one.
    hint = did_you_mean(field, names) or f"; fields are {', '.join(names)}"
    raise ConfigurationError(f"{field} is not a field{hint}")


def _value(option: Option, node: yaml.Node) -> Any:
    """The value of a field, from one text, or from a list or names with texts where its type has such a form."""
    if isinstance(node, yaml.ScalarNode) and option.type.form != "mapping":
        return option.value(node.value)
    if isinstance(node, yaml.SequenceNode) and option.type.form == "list":
        return option.value(",".join(_text(option, each) for each in node.value))
    if isinstance(node, yaml.MappingNode) and option.type.form == "mapping":
        value = {key.value: _text(option, each) for key, each in node.value}
        option.type.check(option.name, value)
        return value
    expected = {"text": "one value", "list": "one value or a list", "mapping": "names with values, one a line"}
    raise ConfigurationError(f"{option.name} must be {expected[option.type.form]}: {option.help}")


def _text(option: Option, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigurationError(f"{option.name} has a list or mapping where one value is expected: {option.help}")
    return str(node.value)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
