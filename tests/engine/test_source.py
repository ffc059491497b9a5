"""Data and samplers are told the epoch before each pass over them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from allstep.engine import Engine
from tests.engine.recording import Told, batches_of, nothing


class Holder:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)

    def __iter__(self) -> Iterator[int]:
        return iter(range(2))


def test_set_epoch_is_called_before_the_iteration_of_each_epoch_begins() -> None:
    engine, data = Engine(nothing), Told()
    batches = batches_of(engine)
    engine.run(data, max_epochs=3)
    assert data.calls == ["set 0", "iter", "set 1", "iter", "set 2", "iter"]
    assert [epoch for epoch, _ in batches] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda told: Holder(sampler=told),
        lambda told: Holder(batch_sampler=told, sampler=Holder()),
        lambda told: Holder(batch_sampler=Holder(sampler=told), sampler=Holder()),
    ],
    ids=["sampler", "batch sampler", "sampler of the batch sampler"],
)
def test_set_epoch_of_the_sampler_is_called(wrap: Callable[[Told], Any]) -> None:
    told = Told()
    Engine(nothing).run(wrap(told), max_epochs=2)
    assert told.calls == ["set 0", "set 1"]


def test_only_the_first_that_has_set_epoch_is_told() -> None:
    first, second = Told(), Told()
    Engine(nothing).run(Holder(batch_sampler=first, sampler=second))
    assert first.calls
    assert not second.calls


def test_a_distributed_sampler_shuffles_each_epoch_otherwise() -> None:
    class Numbers(Dataset[int]):
        def __getitem__(self, index: int) -> int:
            return index

        def __len__(self) -> int:
            return 32

    sampler: DistributedSampler[int] = DistributedSampler(Numbers(), num_replicas=1, rank=0, shuffle=True)  # type: ignore[arg-type]
    engine = Engine(nothing)
    batches = batches_of(engine)
    engine.run(DataLoader(Numbers(), batch_size=32, sampler=sampler), max_epochs=2)
    assert batches[0].tolist() != batches[1].tolist()
    assert sorted(batches[0].tolist()) == sorted(batches[1].tolist()) == list(range(32))
