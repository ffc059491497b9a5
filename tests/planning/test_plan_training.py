"""Plans against arithmetic by hand, and against what a step takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

import allstep
from allstep.errors import AllstepError, ArgumentError, ArgumentTypeError, MeshError, ParallelError
from allstep.parallel import materialised_later, wrap_module
from allstep.planning import Plan
from allstep.planning.torch_private import fake_ranks
from allstep.testing import run_ranks
from allstep.world import World, plan_training
from tests.memory import Peak
from tests.planning.models import CPU, Block, allocations, blocks, train

WHOLE = 3 * 8 * 256**2 * 4  # bytes of the parameters of `blocks()`
STEPS = 3 * 2 * 4  # bytes in which AdamW counts the steps of each parameter


def plan(module: nn.Module | None = None, batch: Any = None, **options: Any) -> Plan:
    batch = torch.randn(16, 256) if batch is None else batch
    return plan_training(blocks() if module is None else module, batch, device=CPU, **options)


def carried(found: Plan) -> dict[tuple[str, str], tuple[int, int, int]]:
    return {(each.collective, each.dimension): (each.ranks, each.calls, each.bytes) for each in found.traffic}


@pytest.mark.parametrize(
    ("mesh", "over"),
    [({"shard": 64}, {}), ({"replicate": 8, "shard": 64}, {("all-reduce", "replicate"): (8, 3, WHOLE // 64)})],
)
def test_a_plan_of_64_and_512_ranks_equals_arithmetic(mesh: dict[str, int], over: dict[Any, Any]) -> None:
    found = plan(mesh=mesh, units=Block)
    assert found.ranks == 64 * mesh.get("replicate", 1)
    assert (found.held.parameters, found.held.gradients) == (WHOLE // 64, WHOLE // 64)
    assert found.held.optimizer == 2 * WHOLE // 64 + STEPS
    # Each unit is gathered for its forward and for its backward pass.
    gathered = {("all-gather", "shard"): (64, 6, 2 * WHOLE), ("reduce-scatter", "shard"): (64, 3, WHOLE)}
    assert carried(found) == gathered | over
    assert next(each.sent for each in found.traffic if each.collective == "all-gather") == 2 * WHOLE * 63 // 64


def test_a_plan_without_a_mesh_is_that_of_ddp() -> None:
    found = plan(ranks=64)
    assert (found.held.parameters, found.held.gradients) == (WHOLE, WHOLE)
    assert {key: (ranks, size) for key, (ranks, _, size) in carried(found).items()} == {
        ("all-reduce", "all"): (64, WHOLE)
    }
    assert not plan().traffic


def test_a_divided_model_is_planned_by_its_parts() -> None:
    styles = {"*.up": "colwise", "*.down": "rowwise"}
    alone = plan(mesh={"tensor": 4}, tensor_plan=styles)
    assert alone.held.parameters == WHOLE // 4
    assert carried(alone)[("all-reduce", "tensor")][0] == 4
    assert plan(mesh={"shard": 8, "tensor": 4}, units=Block, tensor_plan=styles).held.parameters == WHOLE // 32
    copies = plan(mesh={"data": 8, "tensor": 4}, tensor_plan=styles)
    assert copies.held.parameters == WHOLE // 4
    assert carried(copies)[("all-reduce", "data")][2] == WHOLE // 4


def test_precision_and_accumulation_change_what_is_sent() -> None:
    in_bf16 = plan(mesh={"shard": 64}, units=Block, precision="bf16")
    assert carried(in_bf16)[("all-gather", "shard")][2] == WHOLE  # two bytes for four
    assert in_bf16.held.parameters == WHOLE // 64
    twice = plan(mesh={"shard": 64}, units=Block, accumulate=2)
    assert carried(twice)[("all-gather", "shard")][1] == 12
    assert carried(twice)[("reduce-scatter", "shard")][1] == 3
    assert carried(plan(ranks=8, accumulate=2))[("all-reduce", "all")][2] == WHOLE


def test_what_is_on_the_host_is_not_on_the_device() -> None:
    found = plan(mesh={"shard": 8}, units=Block, cpu_offload=True)
    assert (found.held.parameters, found.held.optimizer) == (0, 0)
    assert found.host >= 3 * WHOLE // 8


@pytest.mark.parametrize(
    ("mesh", "anew"),
    [
        ({"shard": 2}, Block),
        pytest.param({"shard": 2}, None, marks=pytest.mark.nightly),
        pytest.param(None, Block, marks=pytest.mark.nightly),
        pytest.param(None, None, marks=pytest.mark.nightly),
    ],
)
def test_the_planned_peak_is_that_of_real_tensors(mesh: Any, anew: Any, tmp_path: Path) -> None:
    ranks = 1 if mesh is None else 2
    found = plan(batch=torch.randn(512, 256), mesh=mesh, units=Block, checkpoint_activations=anew)
    with fake_ranks(ranks), allocations(tmp_path) as peak:
        opened = None if mesh is None else init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
        train(wrap_module(blocks(), CPU, ranks, mesh=opened, units=Block, checkpoint_activations=anew), 512)
    assert found.peak.total == pytest.approx(peak[0], rel=0.05)


def attributes_of(module: nn.Module) -> list[tuple[str, Any]]:
    """The attributes of a module, its hooks by their number."""
    return [(name, len(each) if hasattr(each, "__len__") else each) for name, each in vars(module).items()]


def test_planning_changes_nothing() -> None:
    with allstep.init(mesh={"shard": -1}) as world:
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        before = {name: each.clone() for name, each in model.state_dict().items()}
        batch, group = torch.randn(4, 8), dist.group.WORLD
        drawn = torch.get_rng_state()
        known = attributes_of(model)
        found = world.plan(model, batch, mesh={"replicate": 2, "shard": 4}, checkpoint_activations=1)
        assert found.ranks == 8
        assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
        assert all(each.grad is None and type(each) is nn.Parameter for each in model.parameters())
        assert torch.equal(torch.get_rng_state(), drawn)
        assert dist.group.WORLD is group
        assert attributes_of(model) == known
        wrapped = world.wrap(model)  # the mesh that is open still works
        wrapped(torch.randn(4, 8)).sum().backward()
        assert world.plan(nn.Linear(8, 8), torch.randn(4, 8)).mesh == {"shard": 1}


def _clipped(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(batch).sum()
    norms = [each.square().sum() for each in model.parameters()]  # on parts, of the mesh's ranks
    return loss + 0.0 * torch.stack([each.full_tensor() for each in norms]).sum()  # type: ignore[attr-defined]


def test_training_in_the_same_mesh_goes_on_after_a_plan() -> None:
    with allstep.init(mesh={"shard": -1}) as world:
        for _ in range(2):
            world.plan(blocks(1), torch.randn(2, 256), step=_clipped, units=Block)
            model = world.wrap(blocks(1), units=Block)
            _clipped(model, torch.randn(2, 256)).backward()  # type: ignore[no-untyped-call]
            assert world.clip_grad_norm_(model.parameters(), 1.0) > 0


def test_a_model_without_values_is_planned_without_memory() -> None:
    with materialised_later():
        model = blocks(8, 2048)
    with Peak() as peak:
        found = plan(model, torch.zeros(1, 2048), mesh={"shard": 512}, units=Block)
    assert found.held.parameters == 8 * 8 * 2048**2 * 4 // 512  # 1.1 GB over 512
    assert peak.bytes < 400e6


def test_what_would_fit_is_named() -> None:
    few = plan(batch=torch.randn(512, 256), ranks=4, units=Block, memory="22MB")
    assert few.fitting is not None
    assert few.fitting.changes == ("checkpoint_activations=1", "mesh shard=4")
    assert not few.fits("22MB")
    assert few.fitting.fits("22MB")
    assert "does not fit 22.0 MB; with checkpoint_activations=1, mesh shard=4 it takes" in str(few)


def test_smaller_batches_are_tried_and_not_for_ever() -> None:
    model, batch, optimizer = nn.Linear(8, 512), torch.randn(64, 8), torch.optim.SGD
    needed = plan(model, batch, optimizer=optimizer).peak.total
    smaller = plan(model, batch, optimizer=optimizer, memory=needed - 1).fitting
    assert smaller is not None
    assert smaller.changes[-1] == "batches of 32"
    assert plan(model, batch, optimizer=optimizer, memory="1kB").fitting is None


def test_a_plan_is_a_table_and_numbers_for_json() -> None:
    found = plan(mesh={"shard": 8}, units=Block, memory="8GiB")
    assert "a rank of 8, mesh shard=8" in str(found)
    assert str(found).endswith("fits 8.6 GB")
    numbers = json.loads(json.dumps(found.as_dict()))
    assert numbers["fits"] is True
    assert numbers["peak"]["total"] == found.peak.total
    assert numbers["traffic"][0]["sent"] > 0


def test_a_step_and_a_batch_of_any_kind_are_taken() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.layer(x) - y).square().mean()}

    x = torch.randn(4, 8)
    assert plan(Loss(), (x, x)).peak == plan(Loss(), {"x": x, "y": x}).peak
    given = plan(nn.Linear(8, 8), {"x": x, "names": ["a"]}, step=lambda model, batch: model(batch["x"]).sum())
    assert given.held.parameters == 72 * 4
    assert plan(nn.Linear(8, 8), x, optimizer=torch.optim.SGD).held.optimizer == 0
    sparse = plan(nn.Embedding(9, 4, sparse=True), torch.zeros(3, dtype=torch.int64), optimizer=torch.optim.SGD)
    assert sparse.held.parameters == 36 * 4


def _read(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(batch).sum()
    return loss if loss.item() > 0 else -loss


def _to_numpy(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).sum() * float(batch.numpy().mean())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "said", "options"),
    [
        (ParallelError, r"reads values of a tensor in .*, .*batch\.numpy\(\)", {"step": _to_numpy}),
        (ArgumentError, "optimizer is LBFGS, which runs the step itself", {"optimizer": torch.optim.LBFGS}),
        (ArgumentTypeError, "batch is a DataLoader; give", {"batch": DataLoader([0])}),
        (ParallelError, r"reads values of a tensor in .*test_plan_training.py:\d+, .*loss.item", {"step": _read}),
        (ArgumentTypeError, "a tensor of one element", {"step": lambda model, batch: model(batch)}),
        (ArgumentTypeError, "give what makes one", {"optimizer": torch.optim.SGD([torch.zeros(1)], lr=1.0)}),
        (ArgumentError, "accumulate is 0", {"accumulate": 0}),
        (ArgumentError, "ranks is 0", {"ranks": 0}),
        (ArgumentError, "memory is 'much'", {"memory": "much"}),
        (MeshError, "the world has 6 ranks", {"mesh": {"shard": 4}, "ranks": 6}),
        (ArgumentTypeError, "unitz", {"mesh": {"shard": 4}, "unitz": Block}),
        (ParallelError, "which no submodule fits", {"mesh": {"shard": 4}, "units": nn.Conv1d}),
    ],
)
def test_what_cannot_be_planned_is_an_error(kind: type[AllstepError], said: str, options: Any) -> None:
    with pytest.raises(kind, match=said):
        plan(**options)
    assert not dist.is_initialized()


def test_a_wrapped_module_is_not_planned() -> None:
    with allstep.init(mesh={"shard": -1}) as world, pytest.raises(ParallelError, match="plan it before"):
        world.plan(world.wrap(blocks()), torch.randn(2, 256))


def _measured(world: World, folder: str) -> tuple[int, int]:
    found = world.plan(blocks(), torch.randn(512, 256), units=Block)
    path = Path(folder) / str(world.rank)
    path.mkdir()
    with allocations(path) as peak:
        train(world.wrap(blocks(), units=Block), 512)
    return found.peak.total, peak[0]


@pytest.mark.nightly
@pytest.mark.parametrize("mesh", ["", "shard=2"])
def test_real_ranks_take_what_was_planned_and_what_gloo_copies(mesh: str, tmp_path: Path) -> None:
    for planned, measured in run_ranks(_measured, 2, str(tmp_path), env={"ALLSTEP_MESH": mesh} if mesh else {}):
        assert 0.7 < planned / measured < 1.02
