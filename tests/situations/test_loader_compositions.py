"""Loaders inside other data, samplers of one's own, and what goes on beside the iteration of a loader.

The last seven tests are of situations that no report named: they were thought of, tried and put right.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler

from allstep import Engine, Events, World
from allstep.data import zip_loaders
from tests.situations.judge import Judge
from tests.situations.test_loader_promises import epochs_of, nothing, same_epochs, together


class Side:
    """Two loaders side by side, as in a user's own class: `__iter__` makes a zip."""

    def __init__(self, *loaders: Any) -> None:
        self.loaders = list(loaders)

    def __iter__(self) -> Iterator[Any]:
        return zip(*self.loaders, strict=True)


class Combined(Side):
    """As Lightning's CombinedLoader: an iterator that begins anew whenever it is iterated."""

    def __init__(self, *loaders: Any) -> None:
        super().__init__(*loaders)
        self._iterator: Any = None

    def __len__(self) -> int:
        return min(map(len, self.loaders))

    def __iter__(self) -> Iterator[Any]:
        self._iterator = super().__iter__()
        return self

    def __next__(self) -> Any:
        return next(self._iterator)


def _zipped(world: World, how: str) -> list[list[int]]:
    def made() -> Any:
        return world.loader(torch.arange(12), global_batch_size=6, shuffle=True)

    data = {"a class": Side, "an iterator": Combined, "zip_loaders": zip_loaders}[how](made(), made())
    if how == "an iterator":
        iter(data)
    trainer = Engine(lambda engine, batch: torch.stack(batch))
    seen: list[list[int]] = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: seen.append([]))

    @trainer.on(Events.ITERATION_COMPLETED)
    def take() -> None:
        first, second = trainer.state.output.tolist()
        assert first == second
        seen[-1].extend(first)

    trainer.run(data, max_epochs=3)
    return seen


def _orders(values: Sequence[list[list[int]]]) -> tuple[list[list[int]], bool]:
    whole = [[list(value[epoch]) for value in values] for epoch in range(len(values[0]))]
    return same_epochs(values), len({str(order) for order in whole}) == len(whole)


def test_loaders_side_by_side_have_another_order_in_each_epoch(same_at_every_world_size: Judge) -> None:
    """Lightning#4509, and CombinedLoader, which has `__next__` and can be read again."""
    expected = [[*range(12)]] * 3, True
    for how in ("a class", "an iterator", "zip_loaders"):
        same_at_every_world_size(_zipped, expected, how, join=_orders)


def _hidden(world: World) -> list[str]:
    class Hidden:
        def __iter__(self) -> Iterator[Any]:
            return iter(loader)

    loader = world.loader(torch.arange(12), global_batch_size=6, shuffle=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Engine(nothing).run(Hidden(), max_epochs=3)
    return [str(each.message).split(":")[0] for each in caught]


def test_loaders_that_cannot_be_found_say_that_they_repeat_an_order(same_at_every_world_size: Judge) -> None:
    same_at_every_world_size(_hidden, ["a loader with shuffle=True is read again in the order of epoch 1"])


def _zip_resumed(world: World, mode: Any) -> list[list[int]]:
    def made() -> Any:
        long, short = (world.loader(torch.arange(n), global_batch_size=6, shuffle=True) for n in (24, 12))
        return zip_loaders(long=long, short=short, mode=mode)

    def step(engine: Engine, batch: Any) -> None:
        parts = batch.values() if isinstance(batch, dict) else (batch[1],)
        seen[engine.state.epoch - 1].extend(each for part in parts for each in part.tolist())

    seen: list[list[int]] = [[], []]
    trainer = Engine(step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), trainer.terminate)
    trainer.run(made(), max_epochs=2, window=1)
    again = Engine(step, name=trainer.name)
    again.load_state_dict(trainer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.run(made())
    return seen


def test_zipped_loaders_go_on_inside_an_epoch_at_once(same_at_every_world_size: Judge) -> None:
    twice = sorted([*range(24), *range(12), *range(12)])
    same_at_every_world_size(_zip_resumed, [twice, twice], "max_cycle", join=same_epochs)
    once = sorted([*range(24), *range(12)])
    same_at_every_world_size(_zip_resumed, [once, once], "sequential", join=same_epochs)


# Not in any report


class DrawsByItself(Sampler[int]):
    """A sampler with a generator that nobody else knows, seeded as its user likes."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.permutation(12).tolist())


def _apart(world: World, what: str) -> str:
    if what == "seed":
        loader = world.loader(torch.arange(12), batch_size=2, shuffle=True, seed=world.rank)
    elif what == "the dataset's length":
        loader = world.loader(torch.arange(12 + world.rank), batch_size=2)
    else:
        loader = world.loader(torch.arange(12), batch_size=2, sampler=DrawsByItself(world.rank))
    try:
        Engine(nothing).run(loader)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@pytest.mark.parametrize("what", ["seed", "the dataset's length", "what the sampler draws"])
def test_loaders_that_deal_out_different_samples_are_named(same_at_every_world_size: Judge, what: str) -> None:
    expected = f"TermsError: the loaders of the ranks deal out different samples: {what} is rank 0: "
    same_at_every_world_size(
        _apart, True, what, join=lambda all_: all(each.startswith(expected) for each in all_), world_sizes=(2, 3)
    )


def _peeked(world: World, persistent: bool) -> list[list[int]]:
    loader = world.loader(
        torch.arange(12), global_batch_size=4, num_workers=1, shuffle=True, persistent_workers=persistent
    )
    trainer = Engine(nothing)
    seen = epochs_of(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: next(iter(loader)))
    trainer.run(loader, max_epochs=2)
    return seen


def test_a_look_at_one_batch_in_a_handler_takes_none_from_training(same_at_every_world_size: Judge) -> None:
    same_at_every_world_size(_peeked, [[*range(12)]] * 2, True, join=same_epochs)


def _evaluated_on_resume(world: World) -> list[int]:
    def made() -> Any:
        return world.loader(torch.arange(12), global_batch_size=4)

    trainer = Engine(nothing)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.terminate)
    trainer.run(made(), window=1)
    again, evaluator, loader = Engine(nothing, name=trainer.name), Engine(nothing, name="evaluation"), made()
    again.load_state_dict(trainer.state_dict())
    evaluated = epochs_of(evaluator)
    rest = epochs_of(again)
    again.add_event_handler(Events.GET_BATCH_STARTED, lambda: None if evaluated else evaluator.run(loader))
    again.run(loader)
    return rest[0] + [100 + each for each in evaluated[0]]


def test_an_evaluation_before_a_resumed_batch_reads_from_the_start(same_at_every_world_size: Judge) -> None:
    expected = [*range(8, 12), *range(100, 112)]
    same_at_every_world_size(_evaluated_on_resume, expected, join=together)


class Endless(IterableDataset[int]):
    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[int]:
        at = 0
        while True:
            yield at
            at += 1


def _endless(world: World) -> tuple[int, list[str]]:
    trainer = Engine(nothing)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=20), trainer.terminate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.run(DataLoader(Endless(), batch_size=2), max_epochs=2, window=1)
    return trainer.state.epoch, [str(each.message) for each in caught if each.category is UserWarning]


def test_endless_data_that_tells_a_length_says_what_to_give(same_at_every_world_size: Judge) -> None:
    said = (
        "DataLoader has a length of 2 batches and gives more: the epoch ends where the data does; for data without an "
        "end, give run() an epoch_length, such as 2"
    )
    same_at_every_world_size(
        _endless, (1, True), join=lambda values: (values[0][0], all(said in each[1] for each in values))
    )


class Told(Dataset[int]):
    def __init__(self) -> None:
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        return self.epoch


class ToldStream(IterableDataset[int]):
    def __init__(self) -> None:
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([self.epoch] * 3)


def _told_inside(world: World, stream: bool, workers: int) -> list[list[int]]:
    data: Any = ChainDataset([ToldStream(), ToldStream()]) if stream else ConcatDataset([Told(), Told()])
    loader = world.loader(data, batch_size=6, num_workers=workers, persistent_workers=workers > 0)
    trainer = Engine(nothing)
    seen: list[list[int]] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: seen.append(sorted(set(trainer.state.batch.tolist())))
    )
    trainer.run(loader, max_epochs=3)
    return seen


def test_datasets_inside_a_chain_or_concatenation_hear_of_epochs(same_at_every_world_size: Judge) -> None:
    for stream, workers in ((False, 0), (False, 1), (True, 1)):
        same_at_every_world_size(_told_inside, [[0], [1], [2]], stream, workers)


def _longer_on_one_rank(world: World) -> tuple[list[int], list[int]]:
    def batches(count: int) -> list[torch.Tensor]:
        return [torch.tensor([100 * world.rank + at]) for at in range(count)]

    trainer = Engine(nothing)
    seen, lengths = epochs_of(trainer), []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: lengths.append(trainer.state.iteration))
    if world.rank == 0:
        trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda: trainer.set_data(batches(4)))
    trainer.run(batches(2), max_epochs=3, uneven="longest")
    return lengths, [len(epoch) for epoch in seen]


def _lengths(values: Sequence[tuple[list[int], list[int]]]) -> Any:
    assert all(taken == [2, 2, 2] for _, taken in values[1:])
    assert all(lengths == values[0][0] for lengths, _ in values)
    return values[0]


def test_data_of_one_rank_that_is_replaced_makes_the_epoch_as_long(same_at_every_world_size: Judge) -> None:
    same_at_every_world_size(_longer_on_one_rank, ([2, 6, 10], [2, 4, 4]), join=_lengths)
