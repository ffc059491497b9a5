"""Outputs of all ranks in the order of the samples, in memory and in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from allstep import Alone, Coordinator, Engine
from allstep.data import make_loader
from allstep.errors import MetricError
from allstep.metrics import Gather, Parts
from allstep.metrics.samples import flattened, restored
from allstep.testing import run_ranks, simulate
from allstep.world import World
from tests.metrics.worlds import all_same_bits, same_bits


def predict(engine: Engine, batch: Any) -> Any:
    (x,) = batch
    return {"y_pred": torch.stack([x * 2, x * 3], 1), "y": x}


def gathered(coordinator: Coordinator, gather: Gather, samples: int, *, shuffle: bool, step: Any = predict) -> Any:
    dataset = TensorDataset(torch.arange(samples))
    loader = make_loader(
        dataset,
        rank=coordinator.rank,
        world_size=coordinator.world_size,
        seed=3,
        global_batch_size=5,
        shuffle=shuffle,
    )
    engine = Engine(step, coordinator=coordinator, uneven="longest", idle="skip")
    gather.attach(engine)
    engine.run(loader, max_epochs=2)
    return engine.state.gathered  # type: ignore[attr-defined]


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("samples", [1, 11, 21])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_outputs_are_in_the_datasets_order_at_any_world_size(world_size: int, samples: int, shuffle: bool) -> None:
    def rank(coordinator: Coordinator) -> Any:
        return gathered(coordinator, Gather("y_pred", "y"), samples, shuffle=shuffle)

    every = torch.arange(samples)
    for found in simulate(rank, world_size) if world_size > 1 else [rank(Alone())]:
        assert same_bits(found["y"], every)
        assert same_bits(found["y_pred"], torch.stack([every * 2, every * 3], 1))
        assert same_bits(found["index"], every)


def test_a_tuples_elements_and_a_single_output_are_named_in_order() -> None:
    pair = gathered(Alone(), Gather("a", "b"), 7, shuffle=True, step=lambda e, b: (b[0], b[0] + 1))
    single = gathered(Alone(), Gather("a"), 7, shuffle=True, step=lambda e, b: b[0])
    assert pair["b"].tolist() == [*range(1, 8)]
    assert single["a"].tolist() == [*range(7)]


def ragged(engine: Engine, batch: Any) -> Any:
    (x,) = batch
    return {"wide": torch.ones(len(x), 1 + int(x.max()) % 3), "boxes": [torch.full((int(i) % 4, 2), int(i)) for i in x]}


def test_ragged_outputs_are_a_list_in_the_datasets_order() -> None:
    def rank(coordinator: Coordinator) -> Any:
        return gathered(coordinator, Gather("wide", "boxes"), 11, shuffle=True, step=ragged)

    found = simulate(rank, 3)
    assert all_same_bits(found)
    assert [len(boxes) for boxes in found[0]["boxes"]] == [i % 4 for i in range(11)]
    assert all(bool((boxes == i).all()) for i, boxes in enumerate(found[0]["boxes"]))
    assert len(found[0]["wide"]) == 11


def test_only_the_main_rank_is_given_what_is_for_it() -> None:
    def rank(coordinator: Coordinator) -> Any:
        return gathered(coordinator, Gather("y_pred", "y", to="main"), 11, shuffle=False)

    first, *others = simulate(rank, 3)
    assert first["y"].tolist() == [*range(11)]
    assert others == [None, None]


@pytest.mark.parametrize("format", ["npy", "safetensors"])
@pytest.mark.parametrize("step", [predict, ragged], ids=["even", "ragged"])
def test_what_is_larger_than_the_limit_is_written_in_parts_and_read_in_order(
    tmp_path: Path, format: Any, step: Any
) -> None:
    pytest.importorskip(format.replace("npy", "numpy"))
    names = ("y_pred", "y") if step is predict else ("wide", "boxes")

    def rank(coordinator: Coordinator, limit: int) -> Any:
        gather = Gather(*names, folder=tmp_path, limit=limit, format=format)
        return gathered(coordinator, gather, 11, shuffle=True, step=step)

    in_memory = simulate(rank, 3, 1_000_000)[0]
    assert not list(tmp_path.iterdir())
    for parts in simulate(rank, 3, 10):
        assert isinstance(parts, Parts)
        assert parts.folder == tmp_path / "epoch-0002"
        assert parts.samples == 11
        assert len(parts.files) >= 3
        loaded = parts.load()
        assert all(same_bits(loaded[name], in_memory[name]) for name in names)


def test_a_part_that_cannot_be_written_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    def rank(coordinator: Coordinator) -> str:
        folder = tmp_path / "file" if coordinator.rank == 1 else tmp_path
        with pytest.raises(MetricError) as caught:
            gathered(coordinator, Gather("y", folder=folder, limit=0), 11, shuffle=False)
        return str(caught.value)

    (tmp_path / "file").write_text("in the way")
    errors = simulate(rank, 2)
    assert errors == [errors[0]] * 2
    assert "rank 1: " in errors[0]


def test_an_output_that_lacks_a_name_or_samples_is_an_error_on_all_ranks() -> None:
    def rank(coordinator: Coordinator, names: tuple[str, ...], step: Any) -> str:
        with pytest.raises(MetricError) as caught:
            gathered(coordinator, Gather(*names), 11, shuffle=False, step=step)
        return str(caught.value)

    lacking = simulate(rank, 2, ("y", "more"), predict)
    assert lacking == [lacking[0]] * 2
    assert "lacks more" in lacking[0]
    short = simulate(rank, 2, ("y",), lambda e, b: b[0][1:])
    assert short == [short[0]] * 2
    assert "samples, but the batch had" in short[0]
    uneven = simulate(rank, 2, ("y", "z"), lambda e, b: (b[0], b[0][1:]))
    assert "different numbers of samples" in uneven[0]


def test_ranks_that_gather_different_names_raise_the_same_error() -> None:
    def rank(coordinator: Coordinator) -> str:
        names = ("y",) if coordinator.rank else ("y_pred",)
        with pytest.raises(MetricError) as caught:
            gathered(coordinator, Gather(*names), 11, shuffle=False)
        return str(caught.value)

    errors = simulate(rank, 2)
    assert errors == [errors[0]] * 2
    assert "y_pred on rank 0, y on rank 1" in errors[0]


def test_other_data_is_ordered_by_iteration_and_rank() -> None:
    def rank(coordinator: Coordinator) -> Any:
        engine = Engine(lambda e, b: b, coordinator=coordinator, uneven="longest", idle="skip")
        Gather("x").attach(engine)
        engine.run([torch.full((2,), 10 * at + coordinator.rank) for at in range(3 - coordinator.rank)])
        return engine.state.gathered  # type: ignore[attr-defined]

    for found in simulate(rank, 2):
        assert found["x"].tolist() == [0, 0, 1, 1, 10, 10, 11, 11, 20, 20]
        assert "index" not in found


def test_ragged_columns_are_two_plain_tensors_and_back() -> None:
    column = [torch.ones(2, 0), torch.ones(0, 3), torch.full((1, 2), 7.0)]
    tensors = flattened("a", column)
    assert set(tensors) == {"a.values", "a.shapes"}
    assert same_bits(restored("a", tensors), column)
    with pytest.raises(ValueError, match="'a' differ"):
        flattened("a", [torch.ones(2), torch.ones(2, 2)])


def test_arguments_that_cannot_be_are_refused() -> None:
    for names in ((), ("a", "a"), ("index",)):
        with pytest.raises(ValueError, match="names are"):
            Gather(*names)
    with pytest.raises(ValueError, match="'some'"):
        Gather("a", to="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'csv'"):
        Gather("a", format="csv")  # type: ignore[arg-type]


def over_real_ranks(world: World) -> Any:
    return gathered(world.coordinator, Gather("y_pred", "y"), 21, shuffle=True)


@pytest.mark.slow
def test_over_real_ranks_too() -> None:
    for found in run_ranks(over_real_ranks, 3):
        assert found["y"].tolist() == [*range(21)]
        assert found["y_pred"][:, 1].tolist() == [3 * at for at in range(21)]
