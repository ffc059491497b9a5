"""Whatever goes wrong with outputs on one rank is the same error on all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allstep import Engine
from allstep.coordination import Coordinator
from allstep.errors import MetricError, MetricMismatchError
from allstep.outputs import Gather
from allstep.outputs import gather as gathering
from allstep.testing import run_ranks, simulate
from allstep.world import World, internals
from tests.outputs.predicting import gathered, predict


def errors(make: Callable[[int], Gather], world_size: int, step: Any = predict, kind: Any = MetricError) -> str:
    """The text of the error that every rank raises."""

    def rank(coordinator: Coordinator) -> str:
        with pytest.raises(kind) as caught:
            gathered(coordinator, make(coordinator.rank), 11, shuffle=False, step=step)
        return str(caught.value)

    found = simulate(rank, world_size)
    assert found == [found[0]] * world_size
    return found[0]


def test_a_part_that_cannot_be_written_is_the_same_error_on_all(tmp_path: Path) -> None:
    (tmp_path / "epoch-0001").mkdir()
    (tmp_path / "epoch-0001" / "part-00001-of-00002.positions.npy").mkdir()
    assert "rank 1: IsADirectoryError" in errors(lambda _: Gather("y", folder=tmp_path, limit=0), 2)


def only_on_rank(rank: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a function that `gather` calls raise on one simulated rank."""
    call, here = getattr(gathering, name), threading.local()
    place = Gather.schema

    def raising(*args: Any, **kwargs: Any) -> Any:
        if here.rank == rank:
            raise MemoryError("rehearsed")
        return call(*args, **kwargs)

    def noting(gather: Gather) -> Any:
        here.rank = gather.rank  # type: ignore[attr-defined]
        return place(gather)

    monkeypatch.setattr(gathering, name, raising)
    monkeypatch.setattr(Gather, "schema", noting)


@pytest.mark.parametrize(
    ("name", "folder", "said"),
    [
        ("named_outputs", False, "outputs could not be gathered"),
        ("column_of", False, "outputs could not be gathered"),
        ("pack_samples", False, "outputs could not be gathered"),
        ("join_samples", False, "outputs could not be joined"),
        ("write_part", True, "a part could not be written"),
    ],
)
def test_memory_that_runs_out_on_one_rank_is_the_same_error_on_all(
    name: str, folder: bool, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    only_on_rank(1, name, monkeypatch)

    def make(rank: int) -> Gather:
        gather = Gather("y", folder=tmp_path if folder else None, limit=0)
        gather.rank = rank  # type: ignore[attr-defined]
        return gather

    assert errors(make, 3).startswith(f"{said}: rank 1: MemoryError: rehearsed")


class Empty:
    """A module whose `empty` raises in the threads of some ranks."""

    def __init__(self, raising: set[int]) -> None:
        self.raising = raising

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() in self.raising:
            raise RuntimeError("no memory, rehearsed")
        return torch.zeros(*args, **kwargs)


def test_where_the_main_rank_lacks_memory_for_all_outputs_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    raising: set[int] = set()
    monkeypatch.setattr("allstep.outputs.gather.torch.empty", Empty(raising))

    def step(engine: Engine, batch: Any) -> Any:
        if engine.coordinator.rank == 0:
            raising.add(threading.get_ident())
        return predict(engine, batch)

    said = errors(lambda _: Gather("y", to="main"), 3, step)
    assert said.startswith("outputs could not be joined: rank 0: RuntimeError: no memory, rehearsed")


def test_an_output_that_lacks_a_name_or_samples_is_the_same_error_on_all() -> None:
    assert "lacks more" in errors(lambda _: Gather("y", "more"), 2)
    assert "samples, but the batch had" in errors(lambda _: Gather("y"), 2, lambda e, b: b[0][1:])
    assert "different numbers of samples" in errors(lambda _: Gather("y", "z"), 2, lambda e, b: (b[0], b[0][1:]))


def test_an_output_without_a_value_for_each_sample_says_what_it_is() -> None:
    cases: list[tuple[Any, str]] = [
        (lambda x: {"boxes": x, "scores": x}, "'y' is a mapping of boxes, scores"),
        (lambda x: [{"boxes": i} for i in x], "'y[0]' is a mapping of boxes"),
        (lambda x: x.sum(), "'y' is one number"),
        (lambda x: 3.5, "'y' is a float"),
        (lambda x: [b"text"] * len(x), "'y' has a bytes for a sample"),
        (lambda x: ["text", *[1] * (len(x) - 1)] if len(x) > 1 else [b"text"], " for a sample"),
        (lambda x: [object()] * len(x), "'y' has a object for a sample"),
    ]
    for make, said in cases:
        found = errors(lambda _: Gather("y"), 2, lambda e, b, make=make: {"y": make(b[0])})
        assert said in found
        assert "(iteration 1)" in found


def test_ranks_that_gather_differently_raise_the_same_error(tmp_path: Path) -> None:
    def mismatch(one: Gather, other: Gather) -> str:
        return errors(lambda rank: other if rank else one, 2, kind=MetricMismatchError)

    said = mismatch(Gather("y_pred"), Gather("y"))
    assert "'Gather', state 'outputs'" in said
    assert "y_pred for all ranks on rank 0; y for all ranks on rank 1" in said
    assert "for the main rank on rank 1" in mismatch(Gather("y"), Gather("y", to="main"))
    assert f"in {tmp_path} on rank 0" in mismatch(Gather("y", folder=tmp_path), Gather("y"))
    folder = tmp_path / "other"
    assert f"in {folder} on rank 1" in mismatch(Gather("y", folder=tmp_path), Gather("y", folder=folder))
    one = Gather("y", folder=tmp_path, limit=1)
    assert "above 2 bytes" in mismatch(one, Gather("y", folder=tmp_path, limit=2))
    assert "in safetensors files" in mismatch(one, Gather("y", folder=tmp_path, limit=1, format="safetensors"))


def test_a_gather_on_some_ranks_only_is_the_same_error_on_all() -> None:
    def rank(coordinator: Coordinator) -> str:
        engine = Engine(predict, coordinator=coordinator, uneven="longest", idle="skip")
        if coordinator.rank == 0:
            Gather("y").attach(engine)
        with pytest.raises(MetricMismatchError, match="no further state on rank 1") as caught:
            engine.run([(torch.arange(2),)])
        return str(caught.value)

    found = simulate(rank, 2)
    assert found == [found[0]] * 2


def fails_on_rank_1(world: World, folder: Path | None) -> str:
    """The error of a rank where rank 1 has nothing to give, or, with a folder, nowhere to write it."""

    def step(engine: Engine, batch: Any) -> Any:
        return {} if world.rank == 1 and folder is None else predict(engine, batch)

    with pytest.raises(MetricError) as caught:
        gathered(internals(world).coordinator, Gather("y", folder=folder, limit=0), 11, shuffle=False, step=step)
    return str(caught.value)


@pytest.mark.slow
def test_over_real_ranks_nobody_waits_for_a_rank_that_fails(tmp_path: Path) -> None:
    (tmp_path / "epoch-0001" / "part-00001-of-00002.positions.npy").mkdir(parents=True)
    for folder, said in (
        (None, "rank 1: ArgumentError: the output has no key and lacks y"),
        (tmp_path, "rank 1: IsADirectory"),
    ):
        found = run_ranks(fails_on_rank_1, 2, folder, timeout=150)
        assert found == [found[0]] * 2
        assert said in found[0]
