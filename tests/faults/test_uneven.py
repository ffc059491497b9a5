"""Rows 31 to 33 of the fault matrix: uneven data, an empty shard, and a value that is not finite, over real ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from allstep import Engine, Events
from allstep.errors import DataError, UnevenDataError
from allstep.handlers import TerminateOnNan
from allstep.testing import FaultPlan, run_ranks
from allstep.world import World
from tests.faults.rehearsal import STRIKES, rehearse
from tests.jobs.launchers import Launcher, also_under_torchrun_by_night

pytestmark = pytest.mark.slow

COUNTS = [10, 7, 9]


class Unknown:
    """Batches of a length that nobody knows."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def run(world: World, counts: list[int], known: bool, uneven: str) -> dict[str, Any]:
    batches = [torch.full((2,), float(at)) for at in range(counts[world.rank])]
    taken: list[float] = []
    events: list[tuple[str, int, int]] = []

    def step(engine: Engine, batch: torch.Tensor) -> None:
        world.all_reduce(1.0)
        if engine.state.active:
            taken.append(float(batch[0]))

    engine = Engine(step)
    for event in (Events.EPOCH_STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED, Events.COMPLETED):
        engine.add_event_handler(
            event, lambda e, name=event.name: events.append((name, e.state.epoch, e.state.iteration))
        )
    try:
        state = engine.run(batches if known else Unknown(batches), max_epochs=2, uneven=uneven)  # type: ignore[arg-type]
    except (UnevenDataError, DataError) as error:
        return {"error": str(error), "events": events}
    unread = [(each.rank, each.batches, each.samples) for each in state.unread]
    return {"taken": taken, "events": events, "length": state.epoch_length, "unread": unread}


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_row_31_shortest_ends_with_the_first_rank_that_runs_out(known: bool) -> None:
    results = run_ranks(run, 3, COUNTS, known, "shortest")
    for result in results:
        assert result["events"] == results[0]["events"]
        assert result["length"] == 7
        assert result["taken"] == [*map(float, range(7))] * 2
        assert result["unread"] == [(0, 3, 6), (2, 2, 4)]


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_row_31_longest_takes_every_batch_of_every_rank_once(known: bool) -> None:
    results = run_ranks(run, 3, COUNTS, known, "longest")
    for result, count in zip(results, COUNTS, strict=True):
        assert result["events"] == results[0]["events"]
        assert result["length"] == 10
        assert result["taken"] == [*map(float, range(count))] * 2


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_row_31_error_names_each_ranks_count_on_all(known: bool) -> None:
    results = run_ranks(run, 3, COUNTS, known, "error")
    assert results == [results[0]] * 3
    assert "rank 0 has 10" in results[0]["error"]
    assert "rank 1 has 7" in results[0]["error"]
    assert "rank 2 has 9" in results[0]["error"]


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_row_32_an_empty_shard_is_an_error_on_all_or_trained_around(known: bool) -> None:
    refused = run_ranks(run, 2, [3, 0], known, "shortest")
    assert refused == [refused[0]] * 2
    assert "empty on rank 1" in refused[0]["error"]
    trained = run_ranks(run, 4, [3, 0, 1, 2], known, "longest")
    assert [result["taken"] for result in trained] == [[0.0, 1.0, 2.0] * 2, [], [0.0] * 2, [0.0, 1.0] * 2]


@pytest.mark.parametrize(("known", "named"), [(True, "empty on rank 1"), (False, "rank 1 has 0")])
def test_row_32_an_empty_shard_under_error_is_named_on_all(known: bool, named: str) -> None:
    refused = run_ranks(run, 4, [3, 0, 2, 3], known, "error")
    assert refused == [refused[0]] * 4
    assert named in refused[0]["error"]


def meets_nan(world: World) -> tuple[int, str | None]:
    def step(engine: Engine, batch: int) -> torch.Tensor:
        poisoned = world.rank == 1 and engine.state.iteration == 3
        return torch.tensor(float("nan") if poisoned else 1.0)

    engine = Engine(step)
    TerminateOnNan().attach(engine)
    state = engine.run(range(500))
    return state.iteration, state.stop_reason


def test_row_33_a_nan_on_one_rank_stops_all_and_the_rank_is_named() -> None:
    first, second = run_ranks(meets_nan, 2)
    assert first == second
    assert 3 <= first[0] < 500
    assert first[1] is not None
    assert first[1].startswith("rank 1: ")


@also_under_torchrun_by_night
def test_row_33_a_batch_made_nan_on_one_rank_ends_all_ranks_of_a_job_alike(tmp_path: Path, launcher: Launcher) -> None:
    job = rehearse(tmp_path, "guarded.py", fault=FaultPlan.at(1, 3).nan(), launcher=launcher)
    assert job.text.count(STRIKES) == 1
    ends = [line[line.index("ended at") :] for line in job.lines if "ended at" in line]
    assert ends == [ends[0]] * 2
    found = re.fullmatch(r"ended at (\d+): rank 1: .*iteration 3.*", ends[0])
    assert found, ends
    assert 3 <= int(found[1]) < 500
    assert job.code == 0, job.text
