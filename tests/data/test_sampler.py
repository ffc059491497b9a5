import pickle
from collections.abc import Iterable
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allstep.data import IndexBatch, ShardedBatchSampler
from allstep.errors import DataError


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def world(length: int, world_size: int, **options: object) -> list[ShardedBatchSampler]:
    return [ShardedBatchSampler(length, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def global_batches(samplers: list[ShardedBatchSampler]) -> list[list[int]]:
    """The ranks' parts of each batch, put together in rank order; a rank without a batch adds nothing."""
    parts = [list(sampler) for sampler in samplers]
    return [flat(p[b] for p in parts if b < len(p)) for b in range(max(map(len, parts), default=0))]


lengths = st.integers(0, 200)
batches = st.integers(4, 40)
worlds = st.integers(1, 4)


@given(lengths, batches, st.booleans(), st.booleans(), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_any_world_trains_the_same_global_batches_and_each_sample_once(
    length: int, batch: int, shuffle: bool, drop_last: bool, epoch: int
) -> None:
    found = []
    for world_size in (1, 2, 3, 4):
        options = {"global_batch_size": batch, "shuffle": shuffle, "drop_last": drop_last, "seed": 9}
        samplers = world(length, world_size, **options)
        for sampler in samplers:
            sampler.set_epoch(epoch)
        found.append(global_batches(samplers))
    assert all(one == found[0] for one in found)
    taken = flat(found[0])
    kept = length - length % batch if drop_last else length
    assert len(taken) == kept
    assert len(set(taken)) == kept
    assert set(taken) <= set(range(length))
    assert all(len(one) == batch for one in found[0][:-1])


@given(lengths, batches, worlds, st.booleans())
@settings(max_examples=80, deadline=None)
def test_lengths_and_counts_say_what_the_ranks_yield(length: int, batch: int, world_size: int, drop_last: bool) -> None:
    samplers = world(length, world_size, global_batch_size=batch, drop_last=drop_last)
    yielded = [list(sampler) for sampler in samplers]
    assert [sampler.batches_of_rank for sampler in samplers] == [len(one) for one in yielded]
    assert {len(sampler) for sampler in samplers} == {max(map(len, yielded))}
    for sampler in samplers:
        total = sampler.global_length
        assert total == max(map(len, yielded))
        counts = sampler.counts(0, total + 2)
        assert counts.dtype == np.int64
        expected = [[len(one[b]) if b < len(one) else 0 for one in yielded] for b in range(total + 2)]
        assert counts.tolist() == expected
        assert sampler.counts(total).tolist() == [0] * world_size
        if total:
            assert sampler.counts(total - 1).tolist() == expected[total - 1]
            assert np.ptp(counts, axis=1).max() <= 1


def test_a_tail_smaller_than_the_world_leaves_the_high_ranks_one_batch_short() -> None:
    samplers = world(10, 4, global_batch_size=4)
    assert [sampler.batches_of_rank for sampler in samplers] == [3, 3, 2, 2]
    assert [len(sampler) for sampler in samplers] == [3] * 4
    assert samplers[3].global_length == 3
    assert samplers[3].counts(2).tolist() == [1, 1, 0, 0]
    assert all(all(batch for batch in sampler) for sampler in samplers)


def test_what_does_not_divide_goes_to_the_low_ranks() -> None:
    assert [list(sampler) for sampler in world(7, 3, global_batch_size=5)] == [
        [[0, 1], [5]],
        [[2, 3], [6]],
        [[4]],
    ]


@given(st.integers(1, 200), batches, batches, worlds, worlds, st.booleans(), st.integers(0, 100), st.integers(0, 2**70))
@settings(max_examples=150, deadline=None)
def test_a_saved_place_resumes_at_any_world_and_batch_size(
    length: int, batch: int, new_batch: int, old: int, new: int, shuffle: bool, done: int, seed: int
) -> None:
    first = ShardedBatchSampler(length, global_batch_size=batch, shuffle=shuffle, seed=seed)
    first.set_epoch(3)
    epoch = list(first)
    done = min(done, len(epoch))
    states = []
    for sampler in world(length, old, global_batch_size=batch, shuffle=shuffle, seed=seed):
        sampler.set_epoch(3)
        states.append(sampler.state_dict(done))
    assert all(state == states[0] for state in states)

    samplers = world(length, new, global_batch_size=new_batch, shuffle=shuffle, seed=seed)
    for sampler in samplers:
        sampler.load_state_dict(pickle.loads(pickle.dumps(states[0])))
        sampler.set_epoch(3)
    resumed_at = samplers[0].next_batch
    counts = samplers[0].counts(resumed_at, samplers[0].global_length)
    yielded = [list(sampler) for sampler in samplers]
    rest = [flat(part[b] for part in yielded if b < len(part)) for b in range(len(counts))]
    assert flat(rest) == flat(epoch[done:])
    assert [len(one) for one in rest] == counts.sum(axis=1).tolist()
    assert [len(one) for one in yielded] == [max(0, sampler.batches_of_rank - resumed_at) for sampler in samplers]
    assert all(len(one) == new_batch for one in rest[:-1])
    if batch == new_batch:
        assert rest == epoch[done:]

    again = world(length, old, global_batch_size=new_batch, shuffle=shuffle, seed=seed)
    state = samplers[0].state_dict(min(resumed_at + 1, samplers[0].global_length))
    for sampler in again:
        sampler.load_state_dict(state)
    assert flat(global_batches(again)) == flat(rest[1:])


def test_skipping_holds_for_the_next_iteration_only() -> None:
    sampler = ShardedBatchSampler(10, batch_size=3, shuffle=True, seed=1)
    whole = list(sampler)
    sampler.skip_batches(2)
    assert sampler.next_batch == 2
    assert len(sampler) == 4
    assert list(sampler) == whole[2:]
    assert list(sampler) == whole
    sampler.skip_batches(4)
    assert list(sampler) == []


def test_a_discarded_iterator_does_not_use_up_the_place() -> None:
    sampler = ShardedBatchSampler(10, batch_size=3)
    sampler.skip_batches(2)
    iter(sampler)
    iterator = iter(sampler)
    assert next(iterator) == [6, 7, 8]
    sampler.skip_batches(1)
    assert next(iterator) == [9]
    assert next(iter(sampler)) == [3, 4, 5]


def test_skipping_counts_from_the_epochs_beginning_whatever_was_set_before() -> None:
    sampler = ShardedBatchSampler(10, batch_size=2)
    sampler.load_state_dict(sampler.state_dict(3))
    sampler.skip_batches(1)
    assert list(sampler) == [[2, 3], [4, 5], [6, 7], [8, 9]]


def test_another_epoch_forgets_the_place_and_the_same_one_keeps_it() -> None:
    sampler = ShardedBatchSampler(10, batch_size=4)
    sampler.skip_batches(1)
    sampler.set_epoch(0)
    assert sampler.next_batch == 1
    sampler.set_epoch(1)
    assert [batch[0] for batch in sampler] == [0, 4, 8]

    sampler.load_state_dict({**sampler.state_dict(0), "samples_taken": 3})
    assert list(sampler) == [[3, 4, 5, 6], [7, 8, 9]]
    sampler.set_epoch(2)
    assert [batch[0] for batch in sampler] == [0, 4, 8]


def test_the_iteration_after_a_resumed_one_is_a_whole_epoch() -> None:
    sampler = ShardedBatchSampler(10, batch_size=4)
    sampler.load_state_dict({**sampler.state_dict(0), "samples_taken": 3})
    list(sampler)
    assert list(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(sampler) == 3


def test_a_finished_epoch_keeps_its_length_on_every_rank() -> None:
    for sampler in world(10, 4, global_batch_size=4):
        length = len(sampler)
        sampler.load_state_dict(sampler.state_dict(3))
        assert len(sampler) == length
        assert list(sampler) == []


def test_a_place_inside_a_batch_of_the_new_size_counts_the_batches_before_it() -> None:
    sampler = ShardedBatchSampler(20, batch_size=4)
    sampler.load_state_dict({**sampler.state_dict(0), "samples_taken": 6})
    assert (sampler.next_batch, len(sampler)) == (2, 6)
    iterator = iter(sampler)
    assert next(iterator) == [6, 7, 8, 9]
    assert sampler.state_dict(3)["samples_taken"] == 10
    assert sampler.state_dict(6)["samples_taken"] == 20
    with pytest.raises(DataError, match=r"skip_batches\(1\)"):
        sampler.skip_batches(1)


def test_an_iterator_in_use_is_not_disturbed_by_another_epoch_or_place() -> None:
    options = {"batch_size": 4, "shuffle": True, "seed": 5}
    undisturbed = list(ShardedBatchSampler(5000, **options))
    sampler = ShardedBatchSampler(5000, **options)
    iterator = iter(sampler)
    begun = [next(iterator) for _ in range(3)]
    sampler.set_epoch(4)
    sampler.skip_batches(7)
    assert begun + list(iterator) == undisturbed
    assert sampler.next_batch == 7


def test_an_iterator_made_before_a_place_was_set_does_not_use_it_up() -> None:
    sampler = ShardedBatchSampler(10, batch_size=3)
    iterator = iter(sampler)
    sampler.skip_batches(2)
    assert next(iterator) == [0, 1, 2]
    assert next(iter(sampler)) == [6, 7, 8]


def test_epochs_and_seeds_give_different_orders_and_each_is_repeatable() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = ShardedBatchSampler(50, batch_size=50, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return tuple(next(iter(sampler)))

    places = [(seed, epoch) for seed in (-1, 0, 1, 2**80) for epoch in (0, 1, 2)]
    assert len({order(*place) for place in places}) == len(places)
    assert order(1, 2) == order(1, 2)


def test_a_batch_says_where_in_which_epoch_it_stands_also_after_pickling() -> None:
    (_, second) = world(40_000, 2, global_batch_size=10, shuffle=True)
    second.set_epoch(6)
    positions = []
    for batch in second:
        copy = pickle.loads(pickle.dumps(batch))
        assert isinstance(copy, IndexBatch)
        assert copy == batch
        assert all(type(index) is int for index in copy)
        assert copy.epoch == 6
        positions.append(copy.position)
    assert positions == list(range(5, 40_000, 10))


def test_a_huge_dataset_starts_at_its_middle_without_listing_it() -> None:
    sampler = ShardedBatchSampler(2**62, batch_size=8, shuffle=True, rank=3, world_size=5)
    sampler.skip_batches(2**55)
    batch = next(iter(sampler))
    assert len(batch) == 8
    assert batch.position == 2**55 * 40 + 24
    assert sampler.counts(2**55, 2**55 + 2).tolist() == [[8] * 5] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "batch_size is None and global_batch_size None"),
        ({"batch_size": 1, "global_batch_size": 1}, "give one of them"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"global_batch_size": 3, "world_size": 4}, "global_batch_size is 3 for 4 ranks"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank is 2"),
        ({"batch_size": 1, "world_size": 0}, "world_size 0"),
        ({"batch_size": 1, "seed": None}, "seed is None"),
    ],
)
def test_arguments_that_cannot_work_are_named(options: dict[str, int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        ShardedBatchSampler(10, **options)


def test_data_without_a_length_is_named() -> None:
    with pytest.raises(DataError, match="generator has no length"):
        ShardedBatchSampler((i for i in range(3)), batch_size=1)
    with pytest.raises(DataError, match="length is -1"):
        ShardedBatchSampler(-1, batch_size=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 2}, "seed=2 and this sampler seed=1"),
        ({"length": 11}, "length=11 and this sampler length=10"),
        ({"shuffle": False}, "shuffle=False"),
        ({"version": 99}, "version=99"),
        ({"samples_taken": 11}, "samples_taken=11"),
    ],
)
def test_a_state_of_another_order_is_refused_and_changes_nothing(change: dict[str, object], words: str) -> None:
    sampler = ShardedBatchSampler(10, batch_size=3, shuffle=True, seed=1)
    before = list(sampler)
    with pytest.raises(DataError, match=words):
        sampler.load_state_dict({**sampler.state_dict(1), "epoch": 5, **change})
    assert list(sampler) == before


def test_a_state_that_lacks_something_is_refused() -> None:
    with pytest.raises(DataError, match="lacks epoch, samples_taken"):
        ShardedBatchSampler(10, batch_size=3).load_state_dict({"version": 1, "length": 10, "shuffle": False, "seed": 0})


def test_places_beyond_the_epoch_are_refused() -> None:
    sampler = ShardedBatchSampler(10, batch_size=3)
    for call in (sampler.skip_batches, sampler.state_dict):
        for number in (-1, 5):
            with pytest.raises(DataError, match=str(number)):
                call(number)
    with pytest.raises(DataError, match="counts"):
        sampler.counts(-1)
    with pytest.raises(DataError, match="counts"):
        sampler.counts(3, 2)
