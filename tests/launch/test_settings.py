"""Launch settings refuse what cannot be meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from allstep.errors import ConfigurationError
from allstep.launch.settings import LaunchSettings, parse_nproc, parse_show, parse_variable, shown_ranks


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nproc": 0}, "nproc is 0"),
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


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_nproc, "auto", "auto"),
        (parse_nproc, "12", 12),
        (parse_show, "all", "all"),
        (parse_show, "main", "main"),
        (parse_show, "0,3", (0, 3)),
        (parse_variable, "A=b=c", ("A", "b=c")),
        (parse_variable, "A=", ("A", "")),
    ],
)
def test_text_is_read_as_meant(parse: Callable[[str], object], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_nproc, "0"),
        (parse_nproc, "-1"),
        (parse_nproc, "two"),
        (parse_nproc, "1.5"),
        (parse_nproc, ""),
        (parse_show, "rank0"),
        (parse_show, "0,"),
        (parse_variable, "NAME"),
        (parse_variable, "=x"),
        (parse_variable, "WORLD_SIZE=4"),
    ],
)
def test_text_that_means_nothing_is_refused(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse(text)


def test_shown_ranks_are_those_asked_for_and_must_exist() -> None:
    assert shown_ranks("all", 3) == {0, 1, 2}
    assert shown_ranks("main", 3) == {0}
    assert shown_ranks((1, 2), 3) == {1, 2}
    with pytest.raises(ConfigurationError, match=r"rank 3, but this run has 2 workers: ranks 0 to 1"):
        shown_ranks((0, 3), 2)
