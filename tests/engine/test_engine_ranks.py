"""The engine on two real ranks with a DDP model: any output, an iterator, data of unknown length."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from allstep.coordination import Alone
from allstep.engine import Engine
from allstep.testing import run_ranks
from allstep.trainers import create_supervised_evaluator, create_supervised_trainer
from allstep.world import World
from tests.engine.recording import NoLength


class Report:
    """An output of a type that nobody knows."""

    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


OUTPUTS = {
    "none": lambda loss: None,
    "float": lambda loss: float(loss),
    "dict": lambda loss: {"loss": loss.detach(), "deep": [loss.detach(), "text"]},
    "object": lambda loss: Report(loss.detach()),
}


def batch_of(number: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)


def trained(world: World, data: Any, output: str, **terms: Any) -> tuple[list[float], int, int, str]:
    """Weights after a run over `data`, whose batches are numbers, the iterations and epochs, and the output's type."""
    torch.manual_seed(world.rank)  # DDP makes rank 0's parameters everyone's
    model = world.wrap(nn.Linear(3, 1))
    assert isinstance(model, DistributedDataParallel) == (world.world_size > 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(engine: Engine, number: int) -> Any:
        x, y = world.to_device(batch_of(number, world.rank))
        loss = functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return OUTPUTS[output](loss)

    state = Engine(step).run(data, **terms)
    return _weights(model), state.iteration, state.epoch, type(state.output).__name__


def _weights(model: nn.Module) -> list[float]:
    return [float(value) for parameter in model.parameters() for value in parameter.detach().flatten()]


def with_each_output(world: World) -> list[tuple[list[float], int, int, str]]:
    return [trained(world, range(4), output, max_epochs=2) for output in OUTPUTS]


def with_an_iterator(world: World) -> tuple[list[float], int, int, str]:
    return trained(world, count(), "none", max_epochs=2, epoch_length=3)


def with_unknown_length(world: World) -> tuple[list[float], int, int, str]:
    return trained(world, NoLength(4), "none", max_epochs=3)


def by_one_process_over_both_shares(numbers: Iterator[int]) -> list[float]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in numbers:
        x, y = (torch.cat(parts) for parts in zip(batch_of(number, 0), batch_of(number, 1), strict=True))
        optimizer.zero_grad()
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return _weights(model)


def test_a_step_may_return_anything_on_two_ranks() -> None:
    first, second = run_ranks(with_each_output, 2)
    assert first == second
    assert [kind for _, _, _, kind in first] == ["NoneType", "float", "dict", "Report"]
    expected = by_one_process_over_both_shares(iter([*range(4)] * 2))
    for weights, iterations, epochs, _ in first:
        assert (iterations, epochs) == (8, 2)
        assert weights == pytest.approx(expected, rel=1e-5)


def test_an_iterator_with_an_epoch_length_trains_on_two_ranks() -> None:
    first, second = run_ranks(with_an_iterator, 2)
    assert first == second
    assert first[1:3] == (6, 2)
    assert first[0] == pytest.approx(by_one_process_over_both_shares(iter(range(6))), rel=1e-5)


def test_data_of_unknown_length_trains_on_two_ranks() -> None:
    first, second = run_ranks(with_unknown_length, 2)
    assert first == second
    assert first[1:3] == (12, 3)
    assert first[0] == pytest.approx(by_one_process_over_both_shares(iter([*range(4)] * 3)), rel=1e-5)


def with_supervised_engines(world: World) -> list[tuple[list[float], int, int]]:
    return [_trained_and_evaluated(world, accumulate) for accumulate in (1, 2, 3)]


def _trained_and_evaluated(world: World, accumulate: int) -> tuple[list[float], int, int]:
    torch.manual_seed(world.rank)
    model = world.wrap(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))  # DDP broadcasts buffers
    assert isinstance(model, DistributedDataParallel)
    synced: list[int] = []
    model.register_comm_hook(None, _counting_all_reduce(synced))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(model, optimizer, functional.mse_loss, gradient_accumulation_steps=accumulate)
    trainer.run([batch_of(number, world.rank) for number in range(4)])
    evaluator = create_supervised_evaluator(model, coordinator=Alone())
    if not world.is_main:  # on one rank alone: no collective may be left waiting
        evaluator.run([batch_of(9, world.rank)] * 2)
    return _weights(model), len(synced), evaluator.state.iteration


def _counting_all_reduce(synced: list[int]) -> Any:
    def hook(state: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        synced.append(1)
        tensor = bucket.buffer()
        work = torch.distributed.all_reduce(tensor, async_op=True)
        assert work is not None
        size = torch.distributed.get_world_size()
        future: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda done: done.value()[0] / size)
        return future

    return hook


def test_gradients_are_synced_once_a_group_and_one_rank_may_evaluate_alone() -> None:
    first, second = run_ranks(with_supervised_engines, 2)
    assert [weights for weights, _, _ in first] == [weights for weights, _, _ in second]
    assert [synced for _, synced, _ in first] == [4, 2, 2]  # four iterations in groups of 1, 2 and 3
    assert {iterations for _, _, iterations in first} == {0}
    assert {iterations for _, _, iterations in second} == {2}
