"""Loaders read side by side or one after another: each policy, its epochs, and going on inside an epoch."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch

from allstep.data import Loader, make_loader, zip_loaders
from allstep.errors import DataError


def made(samples: int, rank: int = 0, world_size: int = 1, **options: Any) -> Loader:
    options = {"global_batch_size": 2, "seed": 3, **options}
    return make_loader(torch.arange(samples), rank=rank, world_size=world_size, **options)


def read(data: Any) -> list[Any]:
    """The batches, as lists of numbers."""

    def plain(batch: Any) -> Any:
        if isinstance(batch, dict):
            return {name: part.tolist() for name, part in batch.items()}
        return tuple(part.tolist() if isinstance(part, torch.Tensor) else part for part in batch)

    return [plain(batch) for batch in data]


def test_the_first_that_ends_ends_the_epoch() -> None:
    data = zip_loaders(made(6), made(4))
    assert len(data) == 2
    assert read(data) == [([0, 1], [0, 1]), ([2, 3], [2, 3])]


def test_the_others_begin_again_until_the_last_has_ended() -> None:
    data = zip_loaders(made(4), made(8), mode="max_cycle")
    assert len(data) == 4
    assert [first for first, _ in read(data)] == [[0, 1], [2, 3]] * 2
    assert [second for _, second in read(data)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_loaders_are_read_one_after_another_with_their_names() -> None:
    data = zip_loaders(mode="sequential", a=made(4), b=made(2))
    assert len(data) == 3
    assert read(data) == [("a", [0, 1]), ("a", [2, 3]), ("b", [0, 1])]


def test_named_loaders_give_batches_by_name() -> None:
    assert read(zip_loaders(a=made(2), b=made(2))) == [{"a": [0, 1], "b": [0, 1]}]


@pytest.mark.parametrize("mode", ["min", "max_cycle", "sequential"])
def test_an_epoch_goes_on_at_any_batch_and_the_next_is_whole(mode: Any) -> None:
    def new() -> Any:
        data = zip_loaders(made(6, shuffle=True), made(16, shuffle=True), mode=mode)
        data.set_epoch(2)
        return data

    whole = read(new())
    assert len(whole) == len(new())
    for done in range(len(whole) + 1):
        data = new()
        data.skip_batches(done)
        assert read(data) == whole[done:]
        assert read(data) == whole


def test_epochs_and_repetitions_each_have_an_order_of_their_own() -> None:
    data = zip_loaders(made(8, shuffle=True), made(16, shuffle=True), mode="max_cycle")
    orders = []
    for epoch in range(2):
        data.set_epoch(epoch)
        firsts = [first for first, _ in read(data)]
        orders += [firsts[:4], firsts[4:]]
    assert all(sorted(chain(*order)) == list(range(8)) for order in orders)
    assert len({str(order) for order in orders}) == 4


def test_a_pass_that_has_begun_keeps_its_epoch() -> None:
    data = zip_loaders(made(8, shuffle=True), made(8, shuffle=True))
    expected = read(data)
    begun = iter(data)
    data.set_epoch(1)
    assert read(begun) == expected


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: zip_loaders(), "needs loaders"),
        (lambda: zip_loaders(made(2), a=made(2)), "needs loaders"),
        (lambda: zip_loaders(made(2), mode="longest"), "mode is 'longest'"),
        (lambda: zip_loaders(made(5, 0, 2)), "fewer samples in its last batch than there are ranks"),
        (lambda: zip_loaders(made(2), made(0)).skip_batches(-1), "give 0 or more"),
        (lambda: read(zip_loaders(made(0), made(4), mode="max_cycle")), "gave no batch"),
    ],
)
def test_what_cannot_be_zipped_is_named(make: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        make()
