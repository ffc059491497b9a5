"""Fillers, stops and errors that ranks agree on, over real gloo processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from allstep import Engine, Events
from allstep.errors import DivergenceError
from allstep.testing import RanksError, run_ranks
from allstep.world import World

pytestmark = pytest.mark.slow

FEATURES = 3


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def model_of(world: World) -> nn.Module:
    torch.manual_seed(0)
    return world.wrap(nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1)).double())


def parameters(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


class Reducing(nn.Module):
    """A module whose forward pass reduces a statistic over ranks, as SyncBatchNorm does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.detach().mean(0)
        torch.distributed.all_reduce(mean)
        return x - 0 * mean


def longest(world: World, counts: list[int], accumulate: int) -> dict[str, Any]:
    torch.manual_seed(0)
    inner = nn.Sequential(Reducing(), nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, 1)).double()
    model = world.wrap(inner, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    idle, own = 0, 0

    def step(engine: Engine, batch: torch.Tensor) -> None:
        nonlocal idle, own
        loss = model(batch).square().mean()
        world.all_reduce(1)  # a collective of the step's own
        if engine.state.active:
            own += len(batch)
        else:
            idle += 1
            assert engine.state.weight == 0.0
            assert engine.state.samples == 0
            loss = loss * math.inf
        (loss * engine.state.weight).backward()
        if engine.state.group_end:
            optimizer.step()
            optimizer.zero_grad()

    data = [rows(4, 10 * world.rank + at) for at in range(counts[world.rank])]
    state = Engine(step, accumulate=accumulate).run(iter(data), uneven="longest")
    tracked = int(inner[1].num_batches_tracked)  # type: ignore[arg-type]
    return {"iteration": state.iteration, "idle": idle, "own": own, "tracked": tracked, "trained": parameters(model)}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("counts", [[5, 2, 4], [3, 0, 4]], ids=["uneven", "an-empty-shard"])
def test_fillers_keep_collectives_matched_and_leave_no_trace(counts: list[int], accumulate: int) -> None:
    results = run_ranks(longest, 3, counts, accumulate)
    for result, count in zip(results, counts, strict=True):
        assert result["iteration"] == max(counts)
        assert result["idle"] == max(counts) - count
        assert result["own"] == 4 * count
        assert result["tracked"] == count
        assert result["trained"] == results[0]["trained"]
        assert all(map(math.isfinite, result["trained"]))


def stops(world: World, window: int | None, agreed: bool) -> tuple[int, str | None, list[str]]:
    model = model_of(world)
    fired: list[str] = []

    def step(engine: Engine, batch: torch.Tensor) -> None:
        model(batch).sum().backward()
        if engine.state.iteration == 5 and (world.rank == 1 or agreed):
            engine.terminate(reason="seen enough", agreed=agreed)

    engine = Engine(step)
    for event in (Events.EPOCH_STARTED, Events.ITERATION_COMPLETED, Events.TERMINATE, Events.COMPLETED):
        engine.add_event_handler(event, lambda _, name: fired.append(name), event.name)
    state = engine.run([rows(2, at) for at in range(200)], window=window)
    return state.iteration, state.stop_reason, fired


def test_one_ranks_stop_is_everybodys_at_one_iteration() -> None:
    results = run_ranks(stops, 4, None, False)
    assert results == [results[0]] * 4
    iteration, reason, fired = results[0]
    assert 5 <= iteration < 200
    assert reason == "rank 1: seen enough"
    assert fired[-2:] == ["TERMINATE", "COMPLETED"]


def test_with_a_window_of_one_a_stop_holds_after_the_present_iteration() -> None:
    assert {result[0] for result in run_ranks(stops, 2, 1, False)} == {5}


def test_an_agreed_stop_holds_at_once() -> None:
    assert {result[0] for result in run_ranks(stops, 2, None, True)} == {5}


def diverges(world: World) -> str:
    def step(engine: Engine, batch: int) -> None:
        if engine.state.iteration == 3 and world.rank == 0:
            engine.terminate(agreed=True)

    try:
        Engine(step).run(range(100))
    except DivergenceError as error:
        return str(error)
    return "nothing was noticed"


def test_an_agreed_stop_that_one_rank_alone_calls_is_an_error_on_all() -> None:
    first, second = run_ranks(diverges, 2)
    assert first == second
    assert "terminate(agreed=True)" in first
    assert "coordinator=Alone()" in first


def own_loader(world: World, uneven: str) -> tuple[list[int], list[float]]:
    seen: list[int] = []
    weights: list[float] = []

    def step(engine: Engine, batch: torch.Tensor) -> None:
        weights.append(engine.state.weight)
        if engine.state.active:
            seen.extend(batch.tolist())

    loader = world.loader(torch.arange(13), global_batch_size=6)  # type: ignore[arg-type]
    Engine(step).run(loader, uneven=uneven)  # type: ignore[arg-type]
    return seen, weights


@pytest.mark.parametrize("uneven", ["shortest", "longest", "error"])
def test_a_tail_smaller_than_the_world_is_trained_under_every_policy(uneven: str) -> None:
    results = run_ranks(own_loader, 3, uneven)
    assert sorted(sample for seen, _ in results for sample in seen) == list(range(13))
    assert [weights for _, weights in results] == [[1.0, 1.0, 3.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]


def gives_less(world: World) -> None:
    class Short(torch.utils.data.Sampler[int]):
        def __len__(self) -> int:
            return 8

        def __iter__(self) -> Any:
            return iter(range(8 if world.rank == 0 else 5))

    loader = torch.utils.data.DataLoader(torch.arange(8), batch_size=1, sampler=Short())  # type: ignore[arg-type]
    Engine(lambda e, b: None).run(loader, max_epochs=2)


def test_data_that_gives_less_than_it_declared_is_an_error_on_all_ranks() -> None:
    with pytest.raises(RanksError, match="rank 1 declared 8 batches and gave 5"):
        run_ranks(gives_less, 2)
