"""Launch settings refuse what cannot be meant."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from allstep.errors import ConfigurationError
from allstep.launch.settings import COMMAND_LINE_ONLY, OPTIONS, LaunchSettings, Option, options_table, shown_ranks


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nproc": 0}, "nproc is 0"),
        ({"nproc": "2"}, "nproc is '2'; it must be an integer"),
        ({"show": "mian"}, "show is 'mian'; it must be 'all', 'main', or a tuple"),
        ({"show": (0, -1)}, "show is "),
        ({"share_imports": "no"}, "share_imports is 'no'; it must be True or False"),
        ({"runs": " "}, "runs is ' '; it must be a text that is not empty"),
        ({"grace": "soon"}, "grace is 'soon'; it is seconds"),
        ({"cpu_processes": -1}, "cpu_processes is -1"),
        ({"name": ""}, "name is ''"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"name": ".."}, "name is '..'"),
        ({"name": "-x"}, "name is '-x'"),
        ({"env": {"RANK": "3"}}, "env sets RANK to '3'"),
        ({"env": {"A=B": "3"}}, "A=B"),
        ({"env": {"A": "x\0y"}}, "cannot be an environment variable"),
        ({"grace": -0.1}, "grace is -0.1"),
        ({"grace": float("nan")}, "grace is nan"),
        ({"max_restarts": -1}, "max_restarts is -1; it must be 0 or more"),
        ({"stop_after": 0}, "stop_after is 0; it must be 1 or more"),
        ({"nnodes": 0}, "nnodes is 0"),
        ({"node_rank": -1}, "node_rank is -1"),
        ({"rdzv": "host"}, "rdzv is 'host'; it must be HOST:PORT"),
        ({"rdzv_timeout": -1.0}, "rdzv_timeout is -1.0"),
        ({"limits": "speed=3"}, "speed"),
        ({"fault": "rank=1,explode"}, "explode"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("..", r"\.\.")):
        LaunchSettings(**fields)


def option(name: str) -> Option:
    return next(each for each in OPTIONS if each.name == name)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("nproc", "auto", "auto"),
        ("nproc", "12", 12),
        ("show", "all", "all"),
        ("show", "main", "main"),
        ("show", "0,3", (0, 3)),
        ("env", "A=b=c", {"A": "b=c"}),
        ("env", "A=", {"A": ""}),
        ("grace", "2.5", 2.5),
        ("max_restarts", "0", 0),
        ("share_imports", "no", False),
    ],
)
def test_text_is_read_as_meant(name: str, text: str, value: object) -> None:
    assert option(name).value(text) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nproc", "0"),
        ("nproc", "-1"),
        ("nproc", "two"),
        ("nproc", "1.5"),
        ("nproc", ""),
        ("show", "rank0"),
        ("show", "0,"),
        ("env", "NAME"),
        ("env", "=x"),
        ("env", "WORLD_SIZE=4"),
        ("grace", "soon"),
        ("stop_after", "1e3"),
        ("share_imports", "maybe"),
    ],
)
def test_text_that_means_nothing_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} "):
        option(name).value(text)


def test_shown_ranks_are_those_asked_for_and_must_exist() -> None:
    assert shown_ranks("all", 3) == {0, 1, 2}
    assert shown_ranks("main", 3) == {0}
    assert shown_ranks((1, 2), 3) == {1, 2}
    with pytest.raises(ConfigurationError, match=r"rank 3, but this run has 2 workers: ranks 0 to 1"):
        shown_ranks((0, 3), 2)


def test_every_field_has_an_option_with_its_default() -> None:
    assert [each.name for each in OPTIONS] == [each.name for each in fields(LaunchSettings)]
    settings = LaunchSettings()
    for each in OPTIONS:
        default = getattr(settings, each.name)
        if default is not None and default != {}:
            assert each.value(each.default) == default, each.name


def test_the_table_for_the_documentation_has_every_option() -> None:
    heading, rule, *rows = options_table().splitlines()
    assert heading.count("|") == rule.count("|") == 5
    assert len(rows) == len(OPTIONS) + len(COMMAND_LINE_ONLY)
    for row, each in zip(rows, (*COMMAND_LINE_ONLY, *OPTIONS), strict=True):
        assert row.replace("\\|", "").count("|") == 5, row
        assert each.flag in row
        assert f"`{each.name}" in row or each in COMMAND_LINE_ONLY
        assert each.help[1:] in row


def test_leaving_out_ill_machines_needs_a_preflight_to_find_them() -> None:
    with pytest.raises(ConfigurationError, match="exclude_ill is 2, and no preflight says who is; add preflight"):
        LaunchSettings(exclude_ill=2)
    assert LaunchSettings(exclude_ill=2, preflight=True).exclude_ill == 2
