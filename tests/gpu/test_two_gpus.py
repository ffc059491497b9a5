"""Two ranks with a GPU each, over NCCL; without two GPUs the same code runs on the CPU over gloo."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import allstep
from allstep.engine import Engine
from allstep.metrics import Mean, Metrics
from allstep.testing import FaultPlan, RanksError, run_ranks
from allstep.world import World, internals
from tests.gpu.test_failures import launched

pytestmark = pytest.mark.slow


def uneven(world: World) -> tuple[int, float, list[float]]:
    """A run in which rank 1 has fewer batches; how many iterations, its mean loss, the parameters."""
    torch.manual_seed(0)
    model = world.wrap(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(engine: Engine, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = world.to_device(batch)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        (loss * engine.state.weight).backward()
        optimizer.step()
        return loss.detach()

    trainer = Engine(step, uneven="longest")
    Metrics({"loss": Mean()}).attach(trainer)
    generator = torch.Generator().manual_seed(world.rank)
    data = [(torch.randn(2, 4, generator=generator), torch.zeros(2, 1)) for _ in range(5 - 2 * world.rank)]
    trainer.run(data, max_epochs=2)
    values = [each for part in model.parameters() for each in part.detach().flatten().tolist()]
    return trainer.state.iteration, float(trainer.state.metrics["loss"]), values


def test_uneven_data_and_metrics_are_the_same_on_both_ranks(two_devices):
    first, second = run_ranks(uneven, 2, device=two_devices, timeout=100)
    assert first == second
    assert first[0] == 10


def collectives(world: World) -> list[object]:
    tensor = world.all_reduce(torch.full((3,), world.rank + 1.0, device=world.device))
    gathered = world.all_gather(torch.full((world.rank + 1,), world.rank, device=world.device))
    return [
        tensor.tolist(),
        [each.tolist() for each in gathered],
        [str(each.device.type) for each in (tensor, *gathered)],
        world.all_reduce(world.rank + 0.5),
        world.gather_objects(("rank", world.rank)),
        world.broadcast(torch.arange(2, device=world.device) if world.rank == 1 else None, 1).tolist(),
    ]


def test_tensors_numbers_and_objects_cross_ranks(two_devices):
    kind = two_devices
    expected = [[3.0] * 3, [[0], [1, 1]], [kind] * 3, 2.0, [("rank", 0), ("rank", 1)], [0, 1]]
    assert run_ranks(collectives, 2, device=kind, timeout=100) == [expected] * 2


def sharded(world: World) -> list[float]:
    model = world.wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)))
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 8, device=world.device)).square().mean()
        loss.backward()
        world.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_sharded_model_trains(two_devices):
    first, second = run_ranks(sharded, 2, device=two_devices, env={"ALLSTEP_MESH": "shard=2"}, timeout=100)
    assert first == second
    assert first[-1] < first[0]


def steps(world: World) -> None:
    weight = torch.ones(4, device=world.device)
    Engine(lambda engine, batch: world.all_reduce(weight)).run(range(50))


@pytest.mark.parametrize(("fault", "says"), [("kill", "rank 1 of 2 died"), ("sleep", "rank 1")])
def test_the_rank_that_is_killed_or_hangs_is_named(two_devices, fault, says):
    at = FaultPlan.at(rank=1, iteration=7)
    plan = at.kill(signal.SIGKILL) if fault == "kill" else at.sleep(1000)
    with pytest.raises(RanksError, match=says):
        run_ranks(steps, 2, device=two_devices, fault=plan, env={"ALLSTEP_LIMITS": "step=5"}, timeout=100)


def test_a_job_whose_rank_is_killed_starts_again_and_ends_well(two_devices, tmp_path: Path):
    fault = FaultPlan.at(rank=1, iteration=7, attempt=0).kill(signal.SIGKILL)
    options = ("--max-restarts", "1", "--fault", fault.to_text())
    job = launched(tmp_path, "takes_steps.py", device=torch.device(two_devices), nproc=2, options=options)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("took 20 steps") == 2
    assert (tmp_path / "runs/job/attempt_1").is_dir()


def twice(world: World) -> list[str | None]:
    backends = [world.backend]
    world.close()
    for _ in range(2):
        with allstep.init(device=str(world.device)) as again:
            backends.append(again.backend)
            assert again.all_reduce(torch.ones(1, device=again.device)).item() == again.world_size
            assert internals(again).coordinator.vote([1]).wait() == [2]
    return backends


def test_worlds_follow_each_other(two_devices):
    for backends in run_ranks(twice, 2, device=two_devices, timeout=100):
        assert len(set(backends)) == 1
