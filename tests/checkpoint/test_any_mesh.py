"""Checkpoints of one mesh, loaded on another: all that was saved comes back, by hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from allstep import EMA, Checkpoint, Engine
from allstep.errors import CheckpointError
from allstep.testing import run_ranks
from allstep.world import World
from tests.checkpoint.meshes import (
    MESHES,
    Block,
    Net,
    digest,
    digests,
    laid_out,
    loaded,
    saved_elements,
    sgd_adam,
    trained_and_saved,
)
from tests.memory import Peak

pytestmark = pytest.mark.slow


def check_all_pairs(names: list[str], folder: Path) -> None:
    saved = {}
    elements = set()
    for seed, name in enumerate(names):
        ranks, mesh = MESHES[name]
        found = run_ranks(trained_and_saved, ranks, str(folder / name), seed, env={"ALLSTEP_MESH": mesh})
        assert found == [found[0]] * ranks
        saved[name] = found[0]
        elements.add(saved_elements(str(folder / name)))
    assert len(elements) == 1  # tied weights, and what several ranks hold, are there once
    for name in names:
        ranks, mesh = MESHES[name]
        everyone = run_ranks(loaded, ranks, [str(folder / each) for each in names], env={"ALLSTEP_MESH": mesh})
        for rank, each in enumerate(everyone):
            wrong = {
                of: {key: (value, had.get(key)) for key, value in saved[of].items() if had.get(key) != value}
                for of, had in zip(names, each, strict=True)
                if had != saved[of]
            }
            assert not wrong, f"loaded on {name}, rank {rank}"


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_any_mesh_loads_what_any_other_saved(tmp_path: Path) -> None:
    check_all_pairs(list(MESHES), tmp_path)


def test_fully_sharded_and_tensor_parallel_load_each_other(tmp_path: Path) -> None:
    check_all_pairs(["fsdp2", "tp2"], tmp_path)


def two_maps(world: World, first: int, second: int, tied: bool) -> nn.ModuleDict:
    """Two maps with weights that are sharded by hand, each along a dimension, over a mesh beside the World's."""
    mesh = init_device_mesh("cpu", (world.world_size,), mesh_dim_names=("mine",))
    model = nn.ModuleDict({name: nn.Linear(6, 4, bias=False) for name in ("first", "second")})
    for each, dim in zip(model.values(), (first, second), strict=True):
        each.weight = nn.Parameter(distribute_tensor(each.weight.detach(), mesh, [Shard(dim)]))
    if tied:
        model["second"].weight = model["first"].weight
    return model


def tied_then_apart(world: World, folder: str) -> tuple[str, list[str], int]:
    world.seed_everything(1)
    saved, found = two_maps(world, 0, 0, tied=True), two_maps(world, 1, 0, tied=False)
    engine = Engine(lambda engine, batch: None)
    Checkpoint(f"{folder}/a", {"model": saved}, every=None, strict=True).save(engine, wait=True)
    Checkpoint(f"{folder}/b", {"model": found}, every=None).resume(f"{folder}/a")
    assert found["first"].weight.placements == (Shard(1),)
    values = [digest(each.weight) for each in found.values()]
    return digest(saved["first"].weight), values, saved_elements(f"{folder}/a")


def test_weights_tied_in_a_mesh_of_ones_own_load_where_they_are_apart(tmp_path: Path) -> None:
    for saved, found, elements in run_ranks(tied_then_apart, 2, str(tmp_path), env={"ALLSTEP_MESH": "shard=2"}):
        assert found == [saved, saved]
        assert elements == 4 * 6


class RowSums(torch.optim.Optimizer):
    """Keeps a sum for each row, which no shard of the parameter has the shape of."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, {"lr": 1.0} | options)

    def step(self, closure: Any = None) -> None:
        for at, parameter in enumerate(self.param_groups[0]["params"]):
            self.state[parameter] = {
                "rows": parameter.detach().sum(1, keepdim=True) + at,
                "step": torch.tensor(float(at)),
            }


def regrouped(world: World, folder: str, order: list[str], split: int, saves: bool, lr: float) -> dict[str, Any]:
    """An optimizer whose parameters come in this order, the first `split` of them in a group of their own."""
    world.seed_everything(1)
    model = laid_out(world, Net())
    named = dict(world.unwrap(model).named_parameters())
    parameters = [named[name] for name in order]
    groups = [{"params": each} for each in (parameters[:split], parameters[split:]) if each]
    optimizer = RowSums(groups, lr=lr)
    checkpoint = Checkpoint(folder, {"model": model, "optimizer": optimizer}, every=None, strict=True)
    if saves:
        optimizer.step()
        checkpoint.save(Engine(lambda engine, batch: None), wait=True)
    else:
        checkpoint.resume()
    for of in optimizer.state.values():
        assert isinstance(of["rows"], DTensor) == (world.mesh is not None)
    found = {name: {key: digest(each) for key, each in optimizer.state[named[name]].items()} for name in order}
    return {"states": found, "lr": [group["lr"] for group in optimizer.param_groups]}


MATRICES = ["embedding.weight", "blocks.0.up.weight", "blocks.1.down.weight"]


@pytest.mark.parametrize("split", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_an_optimizers_states_go_by_names_into_other_groups(split: int, tmp_path: Path) -> None:
    saved = run_ranks(regrouped, 1, str(tmp_path), MATRICES, 0, True, 0.25)[0]
    others = (str(tmp_path), MATRICES[::-1], split, False, 1.0)
    for found in run_ranks(regrouped, 2, *others, env={"ALLSTEP_MESH": "shard=2"}):
        assert found == {"states": saved["states"], "lr": [0.25] * (1 + split)}


def in_groups(count: int) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    groups = [{"params": [each], "lr": 0.1 + at} for at, each in enumerate(model.parameters())]
    return {"model": model, "optimizer": torch.optim.SGD(groups if count == 2 else model.parameters(), lr=0.1)}


def test_groups_whose_options_differ_are_not_made_one(tmp_path: Path) -> None:
    saving, loading = (Checkpoint(tmp_path, in_groups(count), every=None, strict=True) for count in (2, 1))
    saving.save(Engine(lambda engine, batch: None), wait=True)
    said = "model/0.weight and model/1.weight in one group, and they were saved in two whose lr differ"
    with pytest.raises(CheckpointError, match=said):
        loading.resume()


WIDE = (80 << 20) // 4 // 2048  # rows of 2048 float32 that take 80 MB


def wide(world: World, seed: int, dim: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A matrix of 80 MB, of which each rank has a part along a dimension, and its momentum."""
    part = torch.rand((WIDE // (1 if dim else world.world_size), 2048 // (world.world_size if dim else 1)))
    mesh = init_device_mesh("cpu", (world.world_size,))
    module = nn.Module()
    module.weight = nn.Parameter(DTensor.from_local(part + seed, mesh, [Shard(dim)], run_check=False))
    return module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def taken_to_save(world: World, folder: str) -> int:
    model, optimizer = wide(world, 0, 0)
    model.weight.grad = model.weight.detach() * 2
    optimizer.step()
    with Peak() as peak:
        saved = Checkpoint(folder, {"model": model, "optimizer": optimizer}, every=None, strict=True)
        saved.save(Engine(lambda engine, batch: None), wait=True)
    return peak.bytes


def taken_to_load(world: World, folder: str, dim: int) -> int:
    model, optimizer = wide(world, 1, dim)
    with Peak() as peak:
        Checkpoint(f"{folder}-next", {"model": model, "optimizer": optimizer}, every=None).resume(folder)
    return peak.bytes


@pytest.mark.nightly
def test_no_rank_holds_the_whole_while_it_saves_or_loads(tmp_path: Path) -> None:
    # A rank's half of the matrix and of its momentum take 80 MB together, which a save copies; the whole takes 160 MB.
    assert max(run_ranks(taken_to_save, 2, str(tmp_path / "two"))) < 110 << 20
    # A rank that loads makes its momentum, 40 MB, and reads one of the two at a time. Of the rows that one rank saved
    # it wants a half each; all of them would take 80 MB more.
    run_ranks(taken_to_save, 1, str(tmp_path / "one"))
    for folder, dim in (("two", 0), ("one", 1)):
        assert max(run_ranks(taken_to_load, 2, str(tmp_path / folder), dim)) < 110 << 20


HOW = {"plain": {}, "again": {"checkpoint_activations": Block}, "units": {"compile": Block}, "whole": {"compile": True}}


def wrapped_and_averaged(world: World, folder: str, how: str, saves: bool) -> tuple[Any, ...]:
    """Names and hashes of a model that is compiled or recomputed, and of its average."""
    world.seed_everything(int(saves))
    model = laid_out(world, Net(), **HOW[how])
    average, optimizer = EMA(model, 0.5), sgd_adam(model)
    objects = {"model": model, "optimizer": optimizer, "average": average}
    checkpoint = Checkpoint(folder, objects, every=None, strict=True)
    if saves:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        for _ in range(2):
            optimizer.step()
            average.update_parameters(world.unwrap(model))
        checkpoint.save(Engine(lambda engine, batch: None), wait=True)
    else:
        checkpoint.resume()
    saved = checkpoint.store.load(checkpoint.store.choose()).state
    averaged = {name: digest(value) for name, value in saved["average"].items()}
    assert averaged == {f"module.{name}" if name != "n_averaged" else name: each for name, each in averages(average)}
    values = sorted(digests(world, model, optimizer).values())
    return list(saved["model"]), averaged, saved["optimizer"]["param_names"], values


def averages(average: EMA) -> list[tuple[str, str]]:
    inside = {name.replace("_orig_mod.", ""): digest(value) for name, value in average.module.state_dict().items()}
    return [("n_averaged", digest(average.n_averaged)), *inside.items()]


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ranks", "mesh"), [(2, ""), (2, "shard=2"), (2, "tensor=2"), (4, "shard=2,tensor=2")])
def test_names_are_plain_and_averages_come_back_however_a_model_is_wrapped(
    ranks: int, mesh: str, tmp_path: Path
) -> None:
    for how in HOW:
        folder = str(tmp_path / how)
        (saved, *_) = run_ranks(wrapped_and_averaged, ranks, folder, how, True, env={"ALLSTEP_MESH": mesh})
        assert saved[0] == list(Net().state_dict())
        assert run_ranks(wrapped_and_averaged, 1, folder, "plain", False) == [saved]
