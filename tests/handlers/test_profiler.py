"""Trace files for chosen iterations and ranks, also of a run that ends before; nothing else is profiled."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from allstep import Alone, Engine, Events
from allstep.engine.registry import HandlerSlot
from allstep.handlers import Profiler
from allstep.testing import run_ranks
from allstep.world import World


def multiply(engine: Engine, batch: object) -> None:
    torch.ones(4, 4).mm(torch.ones(4, 4))


def steps_in(path: Path) -> int:
    """How many matrix products a trace has; a step does one."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


@pytest.mark.parametrize("warm_up", [0, 2])
def test_the_chosen_iterations_are_in_the_trace(warm_up: int, tmp_path: Path) -> None:
    trainer = Engine(multiply, coordinator=Alone())
    profiler = Profiler(tmp_path / "traces", range(3, 6), warm_up=warm_up).attach(trainer)
    trainer.run([0] * 8)
    assert profiler.path == tmp_path / "traces" / "rank_0_iterations_3-5.json.gz"
    assert steps_in(profiler.path) == 3


def test_a_run_that_ends_before_leaves_what_it_had(tmp_path: Path) -> None:
    def step(engine: Engine, batch: object) -> None:
        multiply(engine, batch)
        if engine.state.iteration == 4:
            raise OSError("no disk")

    trainer = Engine(step, coordinator=Alone())
    profiler = Profiler(tmp_path, range(3, 100)).attach(trainer)
    with pytest.raises(OSError, match="no disk"):
        trainer.run([0] * 8)
    assert profiler.path is not None
    assert steps_in(profiler.path) == 2


def test_other_iterations_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Engine(multiply, coordinator=Alone())
    Profiler(tmp_path, range(1000, 1003)).attach(trainer)
    seen: list[Any] = []
    call = HandlerSlot.call
    monkeypatch.setattr(HandlerSlot, "call", lambda self, *rest: (seen.append(self.event), call(self, *rest))[1])
    trainer.run([0] * 20)
    assert seen == [Events.COMPLETED]
    assert list(tmp_path.iterdir()) == []


def _traces(world: World, folder: str, ranks: Any) -> str | None:
    trainer = Engine(multiply)
    profiler = Profiler(folder, range(2, 4), ranks=ranks).attach(trainer)
    trainer.run([0] * 5)
    return None if profiler.path is None else profiler.path.name


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "written"), [((1,), [1]), ("all", [0, 1])])
def test_over_two_ranks_the_chosen_ones_write_a_file_each(ranks: Any, written: list[int], tmp_path: Path) -> None:
    names = run_ranks(_traces, 2, str(tmp_path), ranks)
    assert names == [f"rank_{rank}_iterations_2-3.json.gz" if rank in written else None for rank in range(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [name for name in names if name]


@pytest.mark.parametrize(
    ("options", "text"),
    [({"iterations": range(3)}, r"iterations is range\(0, 3\)"), ({"warm_up": -1}, "warm_up is -1")],
)
def test_wrong_arguments_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Profiler("traces", **options)
