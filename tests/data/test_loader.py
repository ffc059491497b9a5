import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset
from torch.utils.data import RandomSampler as TorchRandomSampler

from allstep.data import Loader, make_loader
from allstep.errors import DataError
from tests.data.datasets import Draws, Failing, ManyDraws, Whoever, collate_with_noise


def loaders(dataset: object, world_size: int = 1, **options: object) -> list[Loader]:
    if "batch_size" not in options:
        options.setdefault("global_batch_size", 6)
    options = {"seed": 3, "shuffle": True, **options}
    return [make_loader(dataset, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def read(ranks: list[Loader], epoch: int = 0) -> torch.Tensor:
    """The rows of an epoch in order: the ranks' parts of each batch put together in rank order."""
    parts = []
    for loader in ranks:
        loader.set_epoch(epoch)
        parts.append(list(loader))
    longest = max(map(len, parts))
    return torch.cat([part[b] for b in range(longest) for part in parts if b < len(part)])


def states() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


@pytest.fixture(params=[0, 2])
def num_workers(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.mark.parametrize("epoch", [0, 4])
def test_augmentation_is_the_same_at_any_world_size_and_number_of_workers(num_workers: int, epoch: int) -> None:
    expected = read(loaders(Draws()), epoch)
    assert len({row[1].item() for row in expected}) == 22
    for world_size in (1, 2, 3):
        found = read(loaders(Draws(), world_size, num_workers=num_workers), epoch)
        assert torch.equal(found, expected)


def test_augmentation_is_the_same_after_a_resume_with_another_batch_size() -> None:
    expected = read(loaders(Draws()))
    (saved,) = loaders(Draws())
    (resumed,) = loaders(Draws(), global_batch_size=5)
    resumed.load_state_dict(saved.state_dict(2))
    assert torch.equal(torch.cat(list(resumed)), expected[12:])


def test_augmentation_differs_between_epochs_seeds_and_positions() -> None:
    runs = [read(loaders(Draws(), shuffle=False, seed=seed), epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for draw in (1, 2, 3):
        assert len(torch.cat([run[:, draw] for run in runs]).unique()) == 66


def test_epochs_reach_workers_that_live_on() -> None:
    (persistent,) = loaders(Draws(), num_workers=2, persistent_workers=True)
    assert persistent.persistent_workers
    for epoch in (0, 1, 5):
        assert torch.equal(read([persistent], epoch), read(loaders(Draws()), epoch))


@pytest.mark.slow
def test_spawned_workers_load_the_same() -> None:
    spawned = loaders(Draws(), num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(read(spawned, 1), read(loaders(Draws()), 1))


@pytest.mark.parametrize("seeding", ["sample", "batch"])
def test_iterating_leaves_the_global_generators_alone(num_workers: int, seeding: str) -> None:
    np.random.normal()  # leaves the second of a pair of normal numbers in numpy's generator
    before = states()
    read(loaders(Draws(), 2, num_workers=num_workers, sample_seeding=seeding))
    assert states() == before


def test_iterating_without_seeding_draws_nothing_either() -> None:
    before = states()
    data = TensorDataset(torch.arange(10))
    for workers in (0, 1):
        (loader,) = loaders(data, num_workers=workers, sample_seeding="off")
        assert len(list(loader)) == 2
    assert states() == before


class Noisy(TensorDataset):
    """Tensors with noise of its own."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index)[0] + torch.rand(1)


def test_only_what_can_draw_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(random, "seed", lambda seed: seeds.append(seed))
    tensors = TensorDataset(torch.arange(22.0))
    for data in (tensors, torch.arange(22), list(range(22)), Subset(tensors, range(9)), tensors + tensors):
        read_rows = list(loaders(data)[0])
        assert len(read_rows) == -(-len(data) // 6)
    assert not seeds
    for data in (Noisy(torch.zeros(22)), Subset(Noisy(torch.zeros(22)), range(22))):
        list(loaders(data, sample_seeding=None)[0])
    assert len(seeds) == 44
    list(loaders(tensors, collate_fn=list)[0])  # it may draw
    list(loaders(tensors, sample_seeding="sample")[0])
    assert len(seeds) == 88


def test_the_global_generators_are_put_back_when_a_sample_fails() -> None:
    (loader,) = loaders(Failing())
    before = states()
    with pytest.raises(LookupError, match="cannot be read"):
        next(iter(loader))
    assert states() == before


def test_seeding_by_batch_is_the_same_at_any_number_of_workers() -> None:
    expected = read(loaders(Draws(), sample_seeding="batch"))
    assert torch.equal(read(loaders(Draws(), sample_seeding="batch", num_workers=2)), expected)
    assert not torch.equal(read(loaders(Draws(), sample_seeding="sample")), expected)
    assert len(expected[:, 1].unique()) == 22


@pytest.mark.nightly
def test_a_dataset_of_hugging_face_is_read_by_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face = pytest.importorskip("datasets")
    data = hugging_face.Dataset.from_dict({"x": list(range(22))}).with_format("torch")
    asked: list[int] = []
    read_many = type(data).__getitems__
    monkeypatch.setattr(
        type(data), "__getitems__", lambda self, keys: (asked.append(len(keys)), read_many(self, keys))[1]
    )
    (loader,) = loaders(data)
    assert torch.cat([batch["x"] for batch in loader]).sort().values.tolist() == list(range(22))
    assert asked == [6, 6, 6, 4]


def test_random_collation_is_the_same_at_any_number_of_workers() -> None:
    (alone,) = loaders(Draws(), collate_fn=collate_with_noise)
    (working,) = loaders(Draws(), collate_fn=collate_with_noise, num_workers=2)
    expected = [noise for _, noise in alone]
    assert [noise for _, noise in working] == expected
    assert len(set(expected)) == len(expected)


def test_datasets_that_read_many_at_once_are_asked_that_way() -> None:
    expected = read(loaders(Draws()))
    data = ManyDraws()
    assert torch.equal(read(loaders(data, 2, sample_seeding="sample")), expected)
    assert all(len(indices) == 1 for indices in data.asked)
    for seeding in ("batch", "off"):
        data.asked.clear()
        read(loaders(data, sample_seeding=seeding))
        assert [len(indices) for indices in data.asked] == [6, 6, 6, 4]


@pytest.mark.parametrize("part", [lambda data: data, lambda data: Subset(data, range(22))], ids=["whole", "subset"])
def test_datasets_that_give_whole_batches_are_seeded_by_batch_unless_told(
    part: Callable[[ManyDraws], Any], caplog: pytest.LogCaptureFixture
) -> None:
    data = ManyDraws()
    with caplog.at_level("INFO", logger="allstep.data"):
        ranks = loaders(part(data), 2)
    assert caplog.text.count("gives whole batches, so random augmentation is seeded by batch") == 1
    drawn = read(ranks)
    assert max(len(indices) for indices in data.asked) == 3
    assert len(drawn[:, 1].unique()) == 22  # still random, and
    assert torch.equal(read(loaders(part(data), 2)), drawn)  # the same again


def test_subsets_are_seeded_by_sample_too() -> None:
    subset = Subset(Draws(40), range(10, 32))
    assert torch.equal(read(loaders(subset, 3)), read(loaders(subset)))


def test_unseeded_workers_get_seeds_by_epoch_and_rank() -> None:
    def seeds(rank: int, epoch: int, seed: int = 3) -> tuple[int, ...]:
        loader = make_loader(
            Whoever(), rank=rank, world_size=2, seed=seed, batch_size=4, sample_seeding="off", num_workers=1
        )
        loader.set_epoch(epoch)
        return tuple(next(iter(loader))[1].tolist())

    assert seeds(0, 1) == seeds(0, 1)
    assert len({seeds(0, 0), seeds(0, 1), seeds(1, 0), seeds(0, 0, seed=4)}) == 4


def test_lengths_are_the_epochs_and_tails_those_of_the_rank() -> None:
    ranks = loaders(TensorDataset(torch.arange(9)), 4, global_batch_size=4)
    assert [len(loader) for loader in ranks] == [3, 3, 3, 3]
    assert [len(list(loader)) for loader in ranks] == [3, 2, 2, 2]


def test_skipping_begins_the_next_iteration_there_and_no_other(num_workers: int) -> None:
    expected = read(loaders(Draws()), 2)
    (loader,) = loaders(Draws(), num_workers=num_workers)
    loader.set_epoch(2)
    loader.skip_batches(3)
    assert torch.equal(torch.cat(list(loader)), expected[18:])
    assert torch.equal(torch.cat(list(loader)), expected)
    loader.skip_batches(1)
    loader.set_epoch(0)
    assert torch.equal(torch.cat(list(loader)), read(loaders(Draws()), 0))


def test_a_new_epoch_does_not_disturb_an_iteration_under_way(num_workers: int) -> None:
    expected = read(loaders(Draws()), 0)
    (loader,) = loaders(Draws(), num_workers=num_workers)
    iterator = iter(loader)
    first = next(iterator)
    loader.set_epoch(1)
    assert torch.equal(torch.cat([first, *iterator]), expected)


def test_a_state_saved_on_two_ranks_resumes_on_three_with_the_rest() -> None:
    expected = read(loaders(Draws()), 1)
    saved = loaders(Draws(), 2)
    for loader in saved:
        loader.set_epoch(1)
    state = saved[1].state_dict(2)
    resumed = loaders(Draws(), 3)
    for loader in resumed:
        loader.load_state_dict(state)
    assert torch.equal(read(resumed, 1), expected[12:])


def test_the_loader_reads_as_the_dataset_it_was_given() -> None:
    data = Draws()
    (loader,) = loaders(data)
    assert isinstance(loader, DataLoader)
    assert loader.source is data
    assert loader.dataset.classes == data.classes
    assert len(loader.dataset) == 22
    assert loader.dataset[4][0] == 4
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = loader.dataset.nothing_like_it


def test_defaults_follow_device_and_workers_and_give_way_to_options() -> None:
    def made(**options: object) -> Loader:
        return loaders(Draws(), **options)[0]

    pinned = {kind: made(device_type=kind).pin_memory for kind in ("cpu", "cuda", "xpu", "mps", "xla")}
    assert pinned == {"cpu": False, "cuda": True, "xpu": True, "mps": False, "xla": False}
    assert made(device_type="cuda", pin_memory=False).pin_memory is False
    assert (made().persistent_workers, made(num_workers=1).persistent_workers) == (False, False)
    assert made(num_workers=1, persistent_workers=True).persistent_workers is True
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    chosen = made(generator=generator)
    next(iter(chosen))
    assert chosen.generator is generator
    assert not torch.equal(generator.get_state(), state)
    assert generator.initial_seed() == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": TorchRandomSampler(Draws()), "shuffle": True}, "each decides the order"),
        ({"sampler": DistributedSampler(Draws(), 2, 0)}, "deals samples to ranks"),
        ({"sampler": iter(range(3))}, "has no length"),
        ({"batch_sampler": [[0]]}, "batch_sampler was given"),
        ({"sample_seeding": "always"}, "sample_seeding is 'always'"),
        ({"in_order": False}, "in_order=False"),
        ({"batch_size": 2, "global_batch_size": 2}, "give one of them"),
        ({"global_batch_size": None}, "batch_size is None"),
    ],
)
def test_options_that_contradict_the_loader_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        make_loader(Draws(), **{"rank": 0, "world_size": 1, "seed": 0, "global_batch_size": 6, **options})


def test_the_next_batch_is_placed_while_the_present_one_is_used():
    placed = []

    def place(batch):
        placed.append(batch[0].tolist())
        return batch

    dataset = TensorDataset(torch.arange(5))
    batches = iter(make_loader(dataset, rank=0, world_size=1, seed=0, batch_size=2, place=place))
    assert (next(batches)[0].tolist(), placed) == ([0, 1], [[0, 1], [2, 3]])
    assert [batch[0].tolist() for batch in batches] == [[2, 3], [4]]
    assert next(batches, None) is None


def test_an_error_of_the_next_batch_comes_behind_the_present_one():
    class Breaks(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index == 2:
                raise OSError("sample 2 is gone")
            return index

    batches = iter(make_loader(Breaks(), rank=0, world_size=1, seed=0, batch_size=2, place=lambda batch: batch))
    assert next(batches).tolist() == [0, 1]
    with pytest.raises(OSError, match="sample 2 is gone"):
        next(batches)
