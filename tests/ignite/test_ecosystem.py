"""Parts of Ignite's ecosystem on this package's engine: as with Ignite's own engine, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ignite.engine
import pytest

import allstep.ignite
from allstep.testing import run_ranks
from tests.ignite import metric_parts
from tests.ignite.parts import PARTS, Script

assert metric_parts  # which adds its parts to the others


def results(names: Any, folder: Path) -> dict[str, Any]:
    """What each part gives, or the exception that it raised."""
    given: dict[str, Any] = {}
    for name, part in PARTS.items():
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        try:
            given[name] = part(Script(names, place))
        except Exception as error:
            given[name] = f"{type(error).__name__}: {error}"
    return given


def results_of_a_rank(world: Any, folder: Path) -> dict[str, Any]:
    given = results(allstep.ignite, folder)
    world.barrier()
    return given


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(ignite.engine, tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(allstep.ignite, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(results_of_a_rank, 2, tmp_path_factory.mktemp("two"), timeout=90)[0]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_gives_on_one_rank_what_it_gives_with_ignite(
    name: str, wanted: dict[str, Any], on_one: dict[str, Any]
) -> None:
    assert not isinstance(wanted[name], str), wanted[name]
    assert on_one[name] == wanted[name]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_gives_on_two_ranks_what_it_gives_on_one(
    name: str, wanted: dict[str, Any], on_two: dict[str, Any]
) -> None:
    assert on_two[name] == wanted[name]
