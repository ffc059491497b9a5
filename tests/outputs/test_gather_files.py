"""Outputs larger than the limit: parts in a folder, read back in the order of the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from allstep import Alone
from allstep.coordination import Coordinator
from allstep.outputs import Gather, Parts
from allstep.outputs.samples import flatten_column, restore_column
from allstep.testing import simulate
from tests.metrics.worlds import same_bits
from tests.outputs.predicting import gathered, predict, ragged

FORMATS = ["npy", "safetensors"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("step", [predict, ragged], ids=["even", "ragged"])
@pytest.mark.parametrize(("samples", "world_size"), [(11, 3), (2, 4), (1, 3)])
def test_what_is_larger_than_the_limit_is_written_in_parts_and_read_in_order(
    tmp_path: Path, format: Any, step: Any, samples: int, world_size: int
) -> None:
    names = ("y_pred", "y") if step is predict else ("wide", "boxes")

    def rank(coordinator: Coordinator, limit: int) -> Any:
        gather = Gather(*names, folder=tmp_path, limit=limit, format=format)
        return gathered(coordinator, gather, samples, shuffle=True, step=step)

    in_memory = simulate(rank, world_size, 1_000_000)[0]
    assert not list(tmp_path.iterdir())
    for parts in simulate(rank, world_size, 10):
        assert isinstance(parts, Parts)
        assert parts.folder == tmp_path / "epoch-0002"
        assert parts.samples == samples
        assert len(parts.files) >= world_size
        loaded = parts.load()
        assert list(loaded) == [*names, "index"]
        assert all(same_bits(loaded[name], in_memory[name]) for name in loaded)


def test_ranks_that_share_their_batches_write_one_part(tmp_path: Path) -> None:
    def rank(coordinator: Coordinator) -> Any:
        return gathered(coordinator, Gather("y", folder=tmp_path, limit=0), 11, shuffle=True)

    for parts in simulate(rank, 4, sharing=2):
        assert (parts.ranks, parts.samples) == (2, 11)
        assert same_bits(parts.load()["y"], torch.arange(11))


@pytest.mark.parametrize("format", FORMATS)
def test_names_of_any_kind_keep_their_outputs_apart(tmp_path: Path, format: Any) -> None:
    names = ("places", "a/b", "a", "values.a", "shapes.a", "rows.a", "%")

    def step(engine: Any, batch: Any) -> Any:
        (x,) = batch
        made = {name: x * 10 + at for at, name in enumerate(names)}
        return made | {"a": [torch.ones(int(i) % 3) for i in x]}

    gather = Gather(*names, folder=tmp_path, limit=0, format=format)
    loaded = gathered(Alone(), gather, 7, shuffle=True, step=step).load()
    for at, name in enumerate(names):
        if name != "a":
            assert loaded[name].tolist() == [10 * i + at for i in range(7)]
    assert [len(each) for each in loaded["a"]] == [i % 3 for i in range(7)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("samples", "world_size"), [(11, 3), (2, 4)])
def test_texts_are_written_and_read_as_they_were(tmp_path: Path, format: Any, samples: int, world_size: int) -> None:
    def step(engine: Any, batch: Any) -> Any:
        return {"id": [f"é{'日' * int(i)}\udce9" for i in batch[0]]}

    def rank(coordinator: Coordinator) -> Any:
        return gathered(
            coordinator, Gather("id", folder=tmp_path, limit=0, format=format), samples, shuffle=True, step=step
        )

    for parts in simulate(rank, world_size):
        assert parts.load()["id"] == [f"é{'日' * i}\udce9" for i in range(samples)]


@pytest.mark.parametrize("format", FORMATS)
def test_what_an_earlier_run_left_in_the_folder_is_replaced(tmp_path: Path, format: Any) -> None:
    def rank(coordinator: Coordinator, step: Any, other: Any) -> Any:
        gather = Gather("wide", folder=tmp_path, limit=0, format=other or format)
        return gathered(coordinator, gather, 11, shuffle=True, step=step, epochs=1)

    mine = tmp_path / "epoch-0001" / "notes.npy"
    mine.parent.mkdir()
    mine.write_text("not a part")
    simulate(rank, 4, lambda e, b: {"wide": [torch.ones(int(i) % 3) for i in b[0]]}, "npy")
    for parts in simulate(rank, 2, lambda e, b: {"wide": b[0]}, None):
        assert parts.load()["wide"].tolist() == [*range(11)]
        assert {*parts.files, mine} == set(parts.folder.iterdir())


def test_parts_for_the_main_rank_are_given_to_no_other(tmp_path: Path) -> None:
    def rank(coordinator: Coordinator) -> Any:
        return gathered(coordinator, Gather("y", to="main", folder=tmp_path, limit=0), 11, shuffle=False)

    first, second = simulate(rank, 2)
    assert first.load()["y"].tolist() == [*range(11)]
    assert second is None


@pytest.mark.parametrize(
    "column",
    [
        [torch.ones(2, 0), torch.ones(0, 3), torch.full((1, 2), 7.0)],
        [torch.tensor(1), torch.tensor(2)],
        [torch.ones(0)],
        [],
    ],
    ids=["ragged", "numbers", "one empty sample", "no sample"],
)
def test_ragged_columns_are_two_plain_tensors_and_back(column: list[torch.Tensor]) -> None:
    tensors = flatten_column("a", column)
    assert set(tensors) == {"values.a", "shapes.a"}
    assert same_bits(restore_column("a", tensors), column)


def test_samples_of_several_types_are_no_column() -> None:
    with pytest.raises(ValueError, match="'a' differ"):
        flatten_column("a", [torch.ones(2), torch.ones(2, 2)])
