"""What happens with a release of Ignite that lacks a private name: each is taken away."""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
import ignite.engine
import pytest
from ignite.engine import deterministic

from allstep.errors import EngineError
from allstep.ignite import DeterministicEngine, Engine
from allstep.ignite.ignite_private import (
    NEEDED,
    NEEDED_OF_DETERMINISTIC,
    NEEDED_OF_MODULE,
    IgniteDistributed,
)


@pytest.mark.parametrize("name", [*NEEDED, "_get_data_length"])
def test_without_a_name_of_the_engine_the_error_names_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ignite.engine.Engine, name)
    make = DeterministicEngine if name == "_get_data_length" else Engine
    with pytest.raises(EngineError, match=rf"has no \w+\.{name}.*install pytorch-ignite 0\.5"):
        make(lambda engine, batch: None)


@pytest.mark.parametrize("name", [*NEEDED_OF_DETERMINISTIC[:2], *NEEDED_OF_MODULE])
def test_without_a_name_of_the_deterministic_engine_the_error_names_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = deterministic if name in NEEDED_OF_MODULE else deterministic.DeterministicEngine
    monkeypatch.delattr(owner, name)
    with pytest.raises(EngineError, match=rf"\.{name}"):
        DeterministicEngine(lambda engine, batch: None)


@pytest.mark.parametrize("name", ["_set_model", "_SerialModel"])
def test_without_a_name_of_its_ranks_they_are_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as lacking:
        lacking.delattr(idist.utils, name)
        IgniteDistributed().leave()
    assert idist.get_world_size() == 1
