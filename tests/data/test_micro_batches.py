"""A global batch that is too large for a rank's memory is taken in several iterations, and stays the same batch."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from allstep.data import ShardedBatchSampler, make_loader
from allstep.errors import DataError


def samplers(length, batch, world, most, **options):
    return [
        ShardedBatchSampler(
            length, global_batch_size=batch, max_batch_per_rank=most, rank=rank, world_size=world, **options
        )
        for rank in range(world)
    ]


worlds = st.tuples(st.integers(1, 5), st.integers(0, 200), st.integers(1, 40), st.integers(1, 9), st.booleans())


@settings(max_examples=200, deadline=None)
@given(worlds)
def test_micro_batches_are_the_global_batches_in_order_and_bounded(drawn):
    world, length, batch, most, drop_last = drawn
    batch = max(batch, world)
    ranks = samplers(length, batch, world, most, drop_last=drop_last, shuffle=True, seed=3)
    plain = samplers(length, batch, 1, None, drop_last=drop_last, shuffle=True, seed=3)[0]
    counts = ranks[0].counts(0, ranks[0].global_length)
    given_ = [list(sampler) for sampler in ranks]
    assert [sampler.batches_of_rank for sampler in ranks] == [len(each) for each in given_]
    taken = [iter(each) for each in given_]
    micro = [[i for rank in range(world) if row[rank] for i in next(taken[rank])] for row in counts.tolist()]
    assert all(micro)
    assert counts.max(initial=0) <= most
    k = ranks[0].accumulate
    assert [list(chain(*micro[at : at + k])) for at in range(0, len(micro), k)] == list(plain)
    sizes = [len(each) for each in micro]
    for at in range(0, len(sizes), k):
        assert max(sizes[at : at + k]) - min(sizes[at : at + k]) <= 1
    assert k == -(-batch // (most * world))


@settings(max_examples=200, deadline=None)
@given(worlds, st.data())
def test_a_place_after_whole_global_batches_loads_at_any_split(drawn, data):
    world, length, batch, most, _ = drawn
    batch = max(batch, world)
    old = samplers(length, batch, world, most, shuffle=True)[0]
    groups = -(-old.global_length // old.accumulate)
    done = data.draw(st.integers(0, groups))
    state = old.state_dict(min(done * old.accumulate, old.global_length), epoch=4)
    other = data.draw(st.integers(1, 5))
    new_batch = max(data.draw(st.sampled_from([batch, 7])), other)
    ranks = samplers(length, new_batch, other, data.draw(st.integers(1, 9)), shuffle=True)
    for sampler in ranks:
        sampler.load_state_dict(state)
    if new_batch == batch:
        assert ranks[0].next_batch == min(done * ranks[0].accumulate, ranks[0].global_length)
    epoch = ShardedBatchSampler(length, batch_size=1, shuffle=True)
    epoch.set_epoch(4)
    order = [i for indices in epoch for i in indices]
    rest = [i for sampler in ranks for indices in sampler for i in indices]
    assert sorted(rest) == sorted(order[state["samples_taken"] :])


def test_positions_of_a_rank_follow_each_other():
    sampler = samplers(1000, 64, 3, 8)[1]
    batches = list(sampler)
    assert sampler.accumulate == 3
    assert all(first.position < second.position for first, second in pairwise(batches))


@pytest.mark.parametrize("most", [0, -1, 1.5])
def test_a_bound_that_is_no_count_is_an_error(most):
    with pytest.raises(DataError, match="max_batch_per_rank is"):
        samplers(10, 4, 2, most)


class Stream(IterableDataset[int]):
    def __iter__(self):
        return iter(range(3))


def test_an_iterable_dataset_cannot_be_bounded():
    with pytest.raises(DataError, match="max_batch_per_rank was given for an iterable dataset"):
        make_loader(Stream(), rank=0, world_size=1, seed=0, batch_size=4, max_batch_per_rank=2)
