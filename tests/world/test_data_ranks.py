"""Ranks that compute each batch together are one where data is concerned: four processes as data=2, tensor=2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.aggregation import CatMetric

from allstep import Checkpoint, Engine, Events, Gather, Metrics, Throughput
from allstep.coordination import Coordinator
from allstep.errors import RanksError, TermsError
from allstep.testing import run_ranks, simulate
from allstep.world import World, internals

pytestmark = pytest.mark.slow

SAMPLES = 21  # in global batches of 4: the last has one sample, so that data rank 1 has none of it
MESH = {"ALLSTEP_MESH": "data=2,tensor=2"}


def trained(world: World, folder: str, epochs: int, resumes: bool) -> dict[str, Any]:
    world.seed_everything(7)
    model = world.wrap(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double())
    world.seed_everything(7, per_rank=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    every = torch.arange(SAMPLES, dtype=torch.float64)
    dataset = TensorDataset(torch.stack([every, every.sin(), every.cos()], 1), every / SAMPLES, every)
    loader = world.loader(dataset, global_batch_size=4, shuffle=True)
    seen: list[float] = []

    def step(engine: Engine, batch: Any) -> Any:
        x, y, index = batch
        errors = (model(x)[:, 0] - y).square()
        (errors.mean() * engine.state.weight).backward()
        if engine.state.group_end:
            optimizer.step()
            optimizer.zero_grad()
        if engine.state.active:
            seen.extend(index.tolist())
        return {"errors": errors.detach(), "index_given": index}

    trainer = Engine(step, uneven="longest", accumulate=2)
    metrics = Metrics({"loss": MeanMetric(), "all": CatMetric()})
    metrics.attach(trainer, lambda output: output["errors"])
    Gather("errors").attach(trainer)
    throughput = Throughput().attach(trainer)
    results = []
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: results.append((dict(trainer.state.metrics), dict(trainer.state.gathered)))
    )
    checkpoint = Checkpoint(folder).attach(trainer)
    if resumes:
        checkpoint.resume()
    trainer.run(loader, max_epochs=epochs)
    checkpoint.close()
    evaluator = Engine(lambda engine, batch: (model(batch[0])[:, 0] - batch[1]).square().detach())
    Metrics({"mse": MeanMetric()}).attach(evaluator)
    evaluator.run(world.loader(dataset, global_batch_size=5))
    return {
        "parameters": [each.detach() for each in world.unwrap(model).parameters()],
        "loss": results[-1][0]["loss"],
        "sorted": results[-1][0]["all"].sort().values,
        "gathered": results[-1][1]["errors"],
        "index": results[-1][1]["index"],
        "mse": evaluator.state.metrics["mse"],
        "seen": seen,
        "units": throughput.total,
        "drawn": torch.rand(3),
        "data": (world.data_rank, world.data_size),
    }


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("parameters", "sorted", "gathered"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
    for name in ("loss", "mse"):  # kept in float32
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=0)
    assert torch.equal(found["index"], torch.arange(SAMPLES))
    assert found["units"] == expected["units"]


def test_a_tensor_mesh_trains_evaluates_and_gathers_as_one_process_does(tmp_path) -> None:
    (alone,) = run_ranks(trained, 1, str(tmp_path / "alone"), 2, False)
    ranks = run_ranks(trained, 4, str(tmp_path / "mesh"), 2, False, env=MESH)
    for found in ranks:
        check_same(found, alone)
    assert [each["data"] for each in ranks] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert ranks[0]["seen"] == ranks[1]["seen"]
    assert sorted(ranks[0]["seen"] + ranks[2]["seen"]) == sorted(alone["seen"])
    # Twins draw the same noise, data ranks another.
    assert torch.equal(ranks[2]["drawn"], ranks[3]["drawn"])
    assert not torch.equal(ranks[0]["drawn"], ranks[2]["drawn"])


@pytest.mark.parametrize(
    ("first", "then"),
    [((4, MESH), (2, {})), pytest.param((3, {}), (4, MESH), marks=pytest.mark.nightly)],
    ids=["from a tensor mesh to plain ranks", "from plain ranks to a tensor mesh"],
)
def test_a_run_goes_on_at_another_number_of_data_ranks(tmp_path, first, then) -> None:
    (alone,) = run_ranks(trained, 1, str(tmp_path / "alone"), 3, False)
    run_ranks(trained, first[0], str(tmp_path / "parts"), 1, False, env=first[1])
    for found in run_ranks(trained, then[0], str(tmp_path / "parts"), 3, True, env=then[1]):
        check_same(found, alone)


def of_a_stopping_twin(coordinator: Coordinator) -> tuple[int, str | None]:
    engine = Engine(lambda engine, batch: None, coordinator=coordinator)

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    def stop() -> None:
        if coordinator.rank == 3:  # a twin, whose samples count for nothing and whose word does
            engine.terminate(reason="enough")

    engine.run([torch.zeros(1)] * 200)
    return engine.state.iteration, engine.state.stop_reason


def test_a_request_of_a_rank_that_is_not_counted_stops_all() -> None:
    said = simulate(of_a_stopping_twin, 4, sharing=2)
    assert len(set(said)) == 1
    assert said[0][0] < 200
    assert said[0][1] == "rank 3: enough"


def of_other_lengths(coordinator: Coordinator) -> None:
    Engine(lambda engine, batch: None, coordinator=coordinator).run([0] * (3 + coordinator.rank))


def test_ranks_that_share_batches_and_have_other_data_are_refused() -> None:
    with pytest.raises(TermsError, match=r"ranks 0 to 1 compute the same batches together, but rank 0 has 3 .* 1 4"):
        simulate(of_other_lengths, 4, sharing=2)


def meshed(world: World, mesh: dict[str, int]) -> Any:
    world.close()
    import allstep

    with allstep.init(mesh=mesh) as opened:
        assert opened.mesh is not None
        assert internals(opened).coordinator.data.size == opened.data_size
        total = torch.tensor([float(opened.rank)])
        torch.distributed.all_reduce(total, group=opened.mesh.get_group(opened.mesh.mesh_dim_names[-1]))
        return opened.mesh.mesh_dim_names, opened.mesh.shape, total.item(), opened.data_rank


def test_the_mesh_of_a_world_is_torchs_with_named_dimensions() -> None:
    ranks = run_ranks(meshed, 4, {"replicate": 2, "shard": -1}, env={"WORLD": ""})
    assert [each[2:] for each in ranks] == [(1.0, 0), (1.0, 1), (5.0, 2), (5.0, 3)]
    assert ranks[0][:2] == (("replicate", "shard"), (2, 2))


def test_what_is_said_outside_comes_before_the_script() -> None:
    ranks = run_ranks(meshed, 2, {"replicate": 2}, env={"ALLSTEP_MESH": "tensor=2"})
    assert [(each[0], each[3]) for each in ranks] == [(("tensor",), 0), (("tensor",), 0)]


def nothing(world: World) -> Any:
    return world.mesh, world.data_rank, world.data_size


def test_without_a_mesh_every_rank_is_a_data_rank() -> None:
    assert run_ranks(nothing, 2) == [(None, 0, 2), (None, 1, 2)]


def test_sizes_that_do_not_make_up_the_world_are_an_error_with_both_numbers() -> None:
    with pytest.raises(RanksError, match="tensor=3, which is 3 ranks, but the world has 2 ranks"):
        run_ranks(nothing, 2, env={"ALLSTEP_MESH": "tensor=3"})
