import pytest
import torch

from allstep.data import Loader, make_loader, shard
from allstep.errors import DataError
from tests.data.datasets import EagerStream, Stream


def loaders(dataset: object, world_size: int = 1, **options: object) -> list[Loader]:
    options.setdefault("batch_size", 4)
    return [make_loader(dataset, rank=rank, world_size=world_size, seed=0, **options) for rank in range(world_size)]


def elements(loader: Loader) -> list[int]:
    return [int(element) for batch in loader for element in (batch[0] if isinstance(batch, list) else batch)]


@pytest.mark.parametrize("dataset", [Stream(), EagerStream()], ids=["lazy", "eager"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_element_goes_to_one_worker_of_one_rank(dataset: Stream, world_size: int, num_workers: int) -> None:
    parts = [elements(loader) for loader in loaders(dataset, world_size, num_workers=num_workers)]
    assert sorted(sum(parts, [])) == list(range(30))  # noqa: RUF017
    assert [len(part) for part in parts] == [30 // world_size] * world_size


def test_loaders_of_different_ranks_can_be_read_in_turn() -> None:
    first, second = (iter(loader) for loader in loaders(Stream(), 2, batch_size=2))
    assert [next(it)[0].tolist() for it in (first, second, first, second)] == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_the_place_is_not_left_behind_between_elements() -> None:
    (_, loader) = loaders(Stream(), 2)
    next(iter(loader))
    assert list(shard(range(3))) == [0, 1, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_reach_the_dataset_also_in_workers_that_live_on(num_workers: int) -> None:
    (loader,) = loaders(Stream(), num_workers=num_workers)
    for epoch in (2, 3):
        loader.set_epoch(epoch)
        assert {int(told) for _, epochs in loader for told in epochs} == {epoch}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_reads_and_drops_for_the_next_iteration_only(num_workers: int) -> None:
    (loader,) = loaders(Stream(), num_workers=num_workers)
    whole = elements(loader)
    loader.skip_batches(2)
    assert elements(loader) == whole[8:]
    assert elements(loader) == whole
    loader.skip_batches(99)
    assert elements(loader) == []
    loader.skip_batches(2)
    loader.set_epoch(1)
    assert elements(loader) == whole


def test_a_global_batch_is_shared_out_and_elements_may_be_batches_already() -> None:
    (loader, _) = loaders(Stream(), 2, batch_size=None, global_batch_size=6)
    assert loader.batch_size == 3
    (unbatched,) = loaders(Stream(), batch_size=None)
    assert next(iter(unbatched)) == (0, -1) or next(iter(unbatched))[0] == 0


def test_iterating_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    for workers in (0, 1):
        elements(loaders(Stream(), num_workers=workers)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_iterable_dataset_keeps_its_attributes_and_its_length_if_any() -> None:
    (loader,) = loaders(Stream())
    assert loader.dataset.length == 30
    with pytest.raises(TypeError):
        len(loader)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shuffle": True}, "shuffle=True over an iterable dataset"),
        ({"batch_size": None, "global_batch_size": 7}, "give 6 or batch_size"),
        ({"batch_size": 2, "global_batch_size": 4}, "give one of them"),
        ({"sampler": [1]}, "sampler was given"),
    ],
)
def test_options_that_a_stream_cannot_follow_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        loaders(Stream(), 2, **options)


def test_the_place_in_a_stream_is_not_the_loaders_to_save() -> None:
    (loader,) = loaders(Stream())
    with pytest.raises(DataError, match="Stream is an iterable dataset"):
        loader.state_dict(1)
    with pytest.raises(DataError, match="Stream is an iterable dataset"):
        loader.load_state_dict({})
    with pytest.raises(DataError, match="skip_batches"):
        loader.skip_batches(-1)


def test_a_given_place_needs_no_loader() -> None:
    assert list(shard("abcdefg", rank=1, world_size=3)) == ["b", "e"]
    assert list(shard("abc")) == ["a", "b", "c"]


@pytest.mark.parametrize("place", [{"rank": 0}, {"world_size": 2}, {"rank": 2, "world_size": 2}])
def test_half_a_place_or_an_impossible_one_is_an_error(place: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"shard\(rank="):
        shard([], **place)


def test_a_plain_loaders_worker_does_not_guess_its_rank() -> None:
    with pytest.raises(DataError, match="does not know this process' rank"):
        list(torch.utils.data.DataLoader(Stream(), num_workers=1))
