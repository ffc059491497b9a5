"""Ignite's deterministic engine on this loop: a run that goes on reads and draws what an unbroken one does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ignite.engine
import pytest
import torch
from ignite.engine.deterministic import ReproducibleBatchSampler
from torch.utils.data import DataLoader

from allstep.ignite import DeterministicEngine, Engine, create_supervised_trainer


def loader() -> DataLoader[Any]:
    return DataLoader(list(range(12)), batch_size=3, shuffle=True)


def drawn() -> Iterator[int]:
    while True:
        yield int(torch.randint(0, 1000, ()))


def seen_by(kind: Any, data: Any, state: dict[str, Any] | None = None, stop_at: int | None = None) -> Any:
    """The batches that a run saw, with a number drawn in each step, and its state when it was left."""
    seen: list[Any] = []

    def step(engine: Any, batch: Any) -> None:
        seen.append((torch.as_tensor(batch).tolist(), float(torch.rand(()))))
        if engine.state.iteration == stop_at:
            engine.terminate()

    torch.manual_seed(7)
    engine = kind(step)
    if state is not None:
        engine.load_state_dict(state)
    engine.run(data, max_epochs=3, epoch_length=4)
    return seen, engine.state_dict()


def test_an_unbroken_run_is_that_of_ignites_own_engine() -> None:
    assert seen_by(DeterministicEngine, loader())[0] == seen_by(ignite.engine.DeterministicEngine, loader())[0]


@pytest.mark.parametrize("stop_at", [4, 6])
def test_a_run_that_goes_on_reads_what_an_unbroken_one_reads(stop_at: int) -> None:
    unbroken, _ = seen_by(DeterministicEngine, loader())
    begun, state = seen_by(DeterministicEngine, loader(), stop_at=stop_at)
    rest, _ = seen_by(DeterministicEngine, loader(), state)
    assert [batch for batch, _ in begun + rest] == [batch for batch, _ in unbroken]
    if stop_at % 4:  # inside a pass the generators go on as well
        assert begun + rest == unbroken


def test_of_an_iterator_what_was_read_is_read_again_and_dropped() -> None:
    unbroken: list[int] = []
    torch.manual_seed(7)
    DeterministicEngine(lambda engine, batch: unbroken.append(batch)).run(drawn(), max_epochs=3, epoch_length=4)
    rest: list[int] = []
    torch.manual_seed(7)
    engine = DeterministicEngine(lambda engine, batch: rest.append(batch))
    engine.load_state_dict({"iteration": 4, "epoch_length": 4, "max_epochs": 3, "rng_states": None})
    engine.run(drawn())
    assert rest == unbroken[4:]


def test_the_loader_is_one_whose_batches_are_drawn_beforehand() -> None:
    engine = DeterministicEngine(lambda engine, batch: None)
    engine.run(loader())
    assert isinstance(engine.state.dataloader.batch_sampler, ReproducibleBatchSampler)


def test_without_data_it_is_refused_as_in_ignite() -> None:
    with pytest.raises(ValueError, match="does not support the option of data=None"):
        DeterministicEngine(lambda engine, batch: None).run(epoch_length=2)


def test_the_factory_makes_one_where_it_is_asked_for() -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(model, optimizer, torch.nn.functional.mse_loss, deterministic=True)
    assert isinstance(trainer, ignite.engine.DeterministicEngine)
    assert isinstance(trainer, Engine)
