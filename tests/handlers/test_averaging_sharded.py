"""EMA and SWA of models in parts over ranks: what they average, evaluate and save, and what each rank holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from allstep import EMA, SWA, Checkpoint, Engine, create_supervised_evaluator
from allstep.errors import ArgumentError, EngineError
from allstep.testing import run_ranks
from allstep.world import World

pytestmark = pytest.mark.slow


class Normed(nn.Module):
    """Tied weights, a norm with statistics, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.second(self.norm(self.first(x)))


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(value) for name, value in module.state_dict().items()}


def averaged(world: World, folder: str, epochs: int) -> dict[str, Any]:
    """Train on the same batches on all ranks, with both averages, going on from `folder`."""
    world.seed_everything(4)
    model = world.wrap(Normed().double())
    ema, swa = EMA(model, 0.5), SWA(model, start=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(engine: Engine, batch: Any) -> None:
        optimizer.zero_grad()
        model(batch).pow(2).mean().backward()
        optimizer.step()

    engine = Engine(step)
    ema.attach(engine)
    swa.attach(engine)
    checkpoint = Checkpoint(folder, {"model": model, "optimizer": optimizer, "ema": ema, "swa": swa}).attach(engine)
    checkpoint.resume()
    batches = [torch.arange(20.0, dtype=torch.float64).reshape(4, 5).sin() + at for at in range(3)]
    engine.run(batches, max_epochs=epochs)
    trained = state(world.unwrap(model))
    evaluator = create_supervised_evaluator(ema, device=world.device)
    evaluator.run([(batches[0], torch.zeros(4, 5, dtype=torch.float64))])
    with torch.no_grad():
        called = ema(batches[0])
        with ema.applied():
            applied = model.eval()(batches[0])
            model.train()
        plain = model.eval()(batches[0])
        model.train()
    swa.update_batch_norm(batches)
    after = state(world.unwrap(model))
    return {
        "ema": state(ema),
        "swa": state(swa),
        "outputs": [called, evaluator.state.output[0], applied],
        "plain": plain,
        "unchanged": all(map(torch.equal, trained.values(), after.values())) and model.training,
        "held": sum(
            whole(each).numel() if not isinstance(each, DTensor) else each.to_local().numel()
            for each in ema.parameters()
        ),
        "tied": ema.module.first.weight is ema.module.second.weight,
    }


def check_like(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("ema", "swa"):
        assert found[name].keys() == expected[name].keys()
        for key, value in expected[name].items():
            if (name, key) != ("swa", "module.norm.num_batches_tracked"):  # which counts those of all ranks
                torch.testing.assert_close(found[name][key], value)
    for mine in (*found["outputs"], *expected["outputs"]):
        torch.testing.assert_close(mine, expected["outputs"][0])
    assert not torch.allclose(found["plain"], found["outputs"][0])
    assert found["unchanged"]
    assert found["tied"]


def test_averages_of_parts_are_those_of_the_whole_and_resume_elsewhere(tmp_path: Path) -> None:
    expected = run_ranks(averaged, 1, str(tmp_path / "one"), 3)[0]
    run_ranks(averaged, 2, str(tmp_path / "parts"), 1, env={"ALLSTEP_MESH": "shard=2"})
    three = run_ranks(averaged, 3, str(tmp_path / "parts"), 2, env={"ALLSTEP_MESH": "shard=3"})
    assert sum(each["held"] for each in three) == 5 * 5 + 4 * 5  # each element on one rank
    for found in run_ranks(averaged, 2, str(tmp_path / "parts"), 3):  # and at last in whole copies
        check_like(found, expected)


@pytest.mark.nightly
def test_averages_of_parts_equal_those_of_one_process(tmp_path: Path) -> None:
    expected = run_ranks(averaged, 1, str(tmp_path / "one"), 2)[0]
    for found in run_ranks(averaged, 3, str(tmp_path / "three"), 2, env={"ALLSTEP_MESH": "shard=3"}):
        check_like(found, expected)


def elsewhere(world: World) -> None:
    plain = nn.Linear(2, 2)
    early = EMA(plain)
    world.wrap(plain)
    with pytest.raises(EngineError, match=r"this EMA was made before world\.wrap put the model in parts"):
        early.attach(Engine(lambda engine, batch: None))
    with pytest.raises(ArgumentError, match="device is 'cpu', but the model is sharded over ranks"):
        EMA(world.wrap(nn.Linear(2, 2)), device="cpu")


def test_the_average_of_a_sharded_model_is_where_its_parts_are() -> None:
    run_ranks(elsewhere, 1, env={"ALLSTEP_MESH": "shard=1"})
