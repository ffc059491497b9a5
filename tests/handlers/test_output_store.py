"""Outputs are kept in order, over an epoch or a run, each rank's own, and are there after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from allstep import Alone, Checkpoint, Engine, Events
from allstep.handlers import OutputStore
from allstep.testing import run_ranks
from allstep.world import World


def number(engine: Engine, batch: object) -> int:
    return engine.state.iteration


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [4, 5, 6]),
        ({"keep": "run"}, [1, 2, 3, 4, 5, 6]),
        ({"every": 2}, [4, 6]),
        ({"transform": lambda output: -output}, [-4, -5, -6]),
    ],
)
def test_outputs_are_kept_in_order(options: dict[str, Any], kept: list[int]) -> None:
    trainer = Engine(number, coordinator=Alone())
    store = OutputStore(**options).attach(trainer)
    trainer.run([0] * 3, max_epochs=2)
    assert store.data == kept


def test_tensors_are_kept_without_their_graph() -> None:
    weight = torch.ones(1, requires_grad=True)
    trainer = Engine(lambda engine, batch: {"y": (weight * 2, [weight])}, coordinator=Alone())
    store = OutputStore().attach(trainer)
    trainer.run([0])
    assert not store.data[0]["y"][0].requires_grad
    assert not store.data[0]["y"][1][0].requires_grad


def _kept(world: World, folder: str, stop_at: int | None) -> list[float]:
    trainer = Engine(lambda engine, batch: torch.tensor(engine.state.iteration * 10 + world.rank))
    store = OutputStore().attach(trainer)
    Checkpoint(folder, {"trainer": trainer, "outputs": store}).attach(trainer).resume()
    if stop_at is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), lambda: trainer.terminate())
    trainer.run([0] * 6, window=1)
    return [int(each) for each in store.data]


@pytest.mark.slow
def test_a_run_that_goes_on_inside_an_epoch_has_the_epochs_outputs(tmp_path: Path) -> None:
    assert run_ranks(_kept, 2, str(tmp_path), 3) == [[10, 20, 30], [11, 21, 31]]
    # The two ranks' outputs are one rank's now.
    assert run_ranks(_kept, 1, str(tmp_path), None) == [[10, 20, 30, 11, 21, 31, 40, 50, 60]]


def _kept_over_uneven_data(world: World) -> list[int]:
    trainer = Engine(number, idle="skip")
    store = OutputStore().attach(trainer)
    trainer.run([0] * (2 + world.rank), uneven="longest")
    return store.data


@pytest.mark.slow
def test_a_rank_without_a_batch_keeps_nothing_of_that_iteration() -> None:
    assert run_ranks(_kept_over_uneven_data, 2) == [[1, 2], [1, 2, 3]]


@pytest.mark.parametrize(
    ("options", "text"), [({"keep": "day"}, "keep is 'day'"), ({"every": 0}, "every is 0"), ({"transform": 3}, "is 3")]
)
def test_wrong_arguments_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        OutputStore(**options)
