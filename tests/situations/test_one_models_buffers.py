"""Buffers, such as BatchNorm's statistics, are one model's wherever it is looked at: those that a save would hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset

from allstep import Checkpoint, Engine, Events, Metrics, World, create_supervised_evaluator, create_supervised_trainer
from allstep.errors import DataError, RanksError
from allstep.metrics import Mean
from allstep.testing import run_ranks
from tests.situations import changing_models as models


class Normed(nn.Module):
    """A model with the running statistics of BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def normed() -> Normed:
    torch.manual_seed(1)
    return Normed()


def statistics(module: nn.Module) -> list[float]:
    return [value for each in module.buffers() for value in each.double().flatten().tolist()]


def loss_on_all(module: nn.Module) -> float:
    """What one process finds on all samples."""
    x, y = models.samples().tensors
    module.eval()
    with torch.no_grad():
        return float(nn.functional.mse_loss(module(x), y))


def looked_at(world: World, folder: Path) -> dict[str, Any]:
    """What is found of a model and of its average, in the middle of an epoch, at its end and at the run's."""
    net = normed()
    model = world.wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    averaged = AveragedModel(net)
    trainer = create_supervised_trainer(model, optimizer, nn.functional.mse_loss)
    found: dict[str, Any] = {}

    def evaluator_of(module: nn.Module) -> Engine:
        engine = create_supervised_evaluator(module)
        engine.add_event_handler(Events.ITERATION_COMPLETED, losses, engine)
        return engine

    total = [0.0]

    def losses(engine: Engine) -> None:
        if engine.state.active:
            y_pred, y = engine.state.output
            total[0] += float(nn.functional.mse_loss(y_pred, y, reduction="sum"))

    def evaluate(name: str, module: nn.Module) -> None:
        total[0] = 0.0
        evaluators[name].run(world.loader(models.samples(), global_batch_size=6))
        found[f"{name} reported"] = world.all_reduce(total[0]) / len(models.samples())
        found[f"{name} in one process"] = loss_on_all(module)  # the rank's own copy

    evaluators = {"model": evaluator_of(model), "averaged": evaluator_of(averaged)}
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: averaged.update_parameters(net))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: evaluate("model", net))

    @trainer.on(Events.EPOCH_COMPLETED)
    def look() -> None:
        found.setdefault("at the epoch's end", statistics(world.unwrap(model)))
        evaluate("averaged", averaged)

    @trainer.on(Events.COMPLETED)
    def look_at_the_end() -> None:
        found.setdefault("at the run's end", statistics(world.unwrap(model)))

    checkpoint = Checkpoint(folder, {"model": model}, every=None, strict=True)
    trainer.run(world.loader(models.samples(), global_batch_size=6), max_epochs=1)
    checkpoint.save(trainer, wait=True)
    state = checkpoint.store.load(checkpoint.store.choose()).state["model"]
    found["saved"] = [value for name, each in state.items() if "norm.r" in name for value in each.double().tolist()]
    trainer.run(world.loader(models.samples(), global_batch_size=6), max_iters=3)
    found["after a cut epoch"] = statistics(net)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_evaluation_and_a_save_are_of_one_model_on_all_ranks(world_size, tmp_path):
    """pytorch/pytorch#13711, huggingface/pytorch-image-models#110."""
    said = run_ranks(looked_at, world_size, tmp_path)
    for found in said:
        assert found == said[0]
        assert found["model reported"] == pytest.approx(found["model in one process"], rel=1e-5)
        assert found["averaged reported"] == pytest.approx(found["averaged in one process"], rel=1e-5)
        assert found["at the run's end"] == found["at the epoch's end"]
        assert set(found["saved"]) <= set(found["at the epoch's end"])


def own_buffers(world: World) -> list[list[float]]:
    """With `broadcast_buffers=False` each rank keeps its own; `world.unify_buffers` makes them rank 0's when asked."""
    net = normed()
    model = world.wrap(net, broadcast_buffers=False)
    trainer = create_supervised_trainer(model, torch.optim.SGD(net.parameters(), lr=0.1), nn.functional.mse_loss)
    trainer.run(world.loader(models.samples(), global_batch_size=6), max_epochs=1)
    own = statistics(net)
    world.unify_buffers(model)
    return [own, statistics(net)]


def test_buffers_that_nobody_broadcasts_stay_each_ranks_until_asked_for():
    (own, shared), (other_own, other_shared) = run_ranks(own_buffers, 2)
    assert own != other_own
    assert own == shared == other_shared


def odd_buffers(world: World) -> list[Any]:
    module = nn.Linear(1, 1)
    module.register_buffer("flag", torch.tensor([world.rank == 0, False, True]))
    module.register_buffer("count", torch.tensor(5 + world.rank))
    module.register_buffer("wave", torch.full((2, 2), complex(world.rank, 1), dtype=torch.complex64).t())
    module.register_buffer("none", torch.empty(0, 3))
    module.register_buffer("short", torch.full((3,), 0.5 + world.rank, dtype=torch.bfloat16))
    world.unify_buffers(module)
    return [each.tolist() for each in module.buffers()]


def test_buffers_of_any_type_are_unified():
    first, second = run_ranks(odd_buffers, 2)
    assert first == second == [[True, False, True], 5, [[1j, 1j], [1j, 1j]], [], [0.5] * 3]


def one_sample(world: World) -> None:
    net = normed()
    trainer = create_supervised_trainer(
        world.wrap(net), torch.optim.SGD(net.parameters(), lr=0.1), nn.functional.mse_loss
    )
    x, y = models.samples(5).tensors
    trainer.run(world.loader(TensorDataset(x, y), global_batch_size=2 * world.world_size), max_epochs=1)


def test_batchnorm_with_one_sample_on_a_rank_says_what_to_choose():
    """fastai/fastai#1352, meetps/pytorch-semseg#214."""
    with pytest.raises(RanksError) as raised:
        run_ranks(one_sample, 2)
    assert isinstance(raised.value.__cause__, DataError)
    assert "rank 0 has one value for each channel in iteration 2" in str(raised.value)
    assert "drop_last=True" in str(raised.value)


def metric_of_one_model(world: World) -> float:
    """A metric of an evaluator of the user's own, in a handler within the epoch."""
    net = normed()
    model = world.wrap(net)
    trainer = create_supervised_trainer(model, torch.optim.SGD(net.parameters(), lr=0.1), nn.functional.mse_loss)

    def evaluate(engine: Engine, batch: Any) -> torch.Tensor:
        x, y = batch
        net.eval()
        with torch.no_grad():
            return nn.functional.mse_loss(net(x), y)

    evaluator = Engine(evaluate, uneven="longest")
    Metrics({"loss": Mean()}).attach(evaluator)
    found = []

    @trainer.on(Events.ITERATION_COMPLETED(every=2))
    def look() -> None:
        state = evaluator.run(world.loader(models.samples(), global_batch_size=6))
        found.append(abs(float(state.metrics["loss"]) - loss_on_all(net)))

    trainer.run(world.loader(models.samples(), global_batch_size=6), max_epochs=2)
    return max(found)


def test_an_evaluator_of_ones_own_reports_of_one_model(same_at_every_world_size):
    same_at_every_world_size(metric_of_one_model, 0.0)
