"""Votes become vectors, vectors are summed, and the sum reads as what all ranks said together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allstep.coordination import MOST_DOUBLINGS, Occasion, Vote, VoteResult, read_result, vector_length

MOST_RANKS = 1 << 18
MOST_SAMPLES = (1 << 26) - 1

flags = st.booleans()
samples = st.lists(st.none() | st.integers(0, MOST_SAMPLES), min_size=3, max_size=3)
votes = st.builds(
    Vote,
    st.just(Occasion.WINDOW),
    st.just(7),
    st.just(5),
    samples,
    terminate=flags,
    terminate_epoch=flags,
    interrupt=flags,
    replace_data=flags,
    gave_less=flags,
    needs_batch=flags,
    unread=st.integers(0, 10**9),
    microseconds=st.integers(0, 10**12),
)
COUNTED = ("terminate", "terminate_epoch", "interrupt", "replace_data", "gave_less", "needs_batch")


def result_of(*cast: Vote, iterations: int = 3, length: int = 40) -> VoteResult:
    vectors = [vote.vector(length) for vote in cast]
    return read_result([sum(column) for column in zip(*vectors, strict=True)], iterations)


@given(st.lists(votes, min_size=1, max_size=8))
def test_a_result_is_the_sum_of_what_each_vote_says(cast: list[Vote]) -> None:
    result = result_of(*cast)
    assert result.occasions == (len(cast), 0, 0)
    assert result.having == tuple(sum(b.samples[at] is not None for b in cast) for at in range(3))
    assert result.samples == tuple(sum(b.samples[at] or 0 for b in cast) for at in range(3))
    for name in COUNTED:
        assert getattr(result, name) == sum(getattr(b, name) for b in cast), name
    assert result.unread == sum(b.unread for b in cast)
    assert result.microseconds == sum(b.microseconds for b in cast)
    assert result.requests == result.terminate + result.terminate_epoch + result.interrupt + result.replace_data
    assert all(result.is_for(b, len(cast)) for b in cast)


@given(st.integers(0, MOST_RANKS), st.integers(0, MOST_SAMPLES), st.integers(0, MOST_SAMPLES))
def test_counts_of_a_quarter_of_a_million_ranks_never_mix_and_fit_63_bits(having: int, most: int, other: int) -> None:
    def column(count: int | None) -> list[int]:
        return Vote(Occasion.WINDOW, 10**6, 10**9, [count]).vector(vector_length(1))

    with_batch, without, last = column(most), column(None), column(other)
    total = [
        a * max(having - 1, 0) + b * (MOST_RANKS - having) + c * min(having, 1)
        for a, b, c in zip(with_batch, without, last, strict=True)
    ]
    assert all(0 <= value < 1 << 63 for value in total)
    result = read_result(total, 1)
    assert result.having == (having,)
    assert result.samples == (max(having - 1, 0) * most + min(having, 1) * other,)


def test_a_batch_of_no_sample_is_a_batch() -> None:
    result = result_of(Vote(Occasion.WINDOW, 0, 0, [0, None, 0]), Vote(Occasion.WINDOW, 0, 0, [3, None, None]))
    assert result.having == (2, 0, 1)
    assert result.samples == (3, 0, 0)


def test_a_vector_has_the_length_asked_for_whatever_it_says() -> None:
    assert len(Vote(Occasion.EPOCH_END, 0).vector(50)) == 50
    assert len(Vote(Occasion.WINDOW, 0, 0, [1] * 9).vector(vector_length(9))) == vector_length(9)
    assert all(isinstance(value, int) for value in Vote(Occasion.WINDOW, 0, 0, [None], True).vector(30))


places = st.tuples(st.sampled_from(Occasion), st.integers(0, 300), st.integers(0, 3000))


@given(st.lists(places, min_size=2, max_size=6))
def test_every_rank_notices_that_ranks_came_to_different_votes(at: list[tuple[Occasion, int, int]]) -> None:
    cast = [Vote(*place) for place in at]
    result = result_of(*cast, iterations=0)
    came_alike = len({(vote.occasion, vote.place) for vote in cast}) == 1
    assert [result.is_for(vote, len(cast)) for vote in cast] == [came_alike] * len(cast)


@pytest.mark.parametrize("at", [(3, 4, 5), (0, 5, 10), (1, 2, 3, 4, 5)])
def test_the_rank_at_the_mean_place_notices_too(at: tuple[int, ...]) -> None:
    by_sequence = [Vote(Occasion.WINDOW, each) for each in at]
    by_iteration = [Vote(Occasion.RUN_END, 9, each) for each in at]
    for cast in (by_sequence, by_iteration):
        result = result_of(*cast, iterations=0)
        assert not any(result.is_for(vote, len(cast)) for vote in cast)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(-5, 5))
def test_neighbouring_places_are_told_apart(sequence: int, iteration: int, apart: int) -> None:
    here = Vote(Occasion.WINDOW, sequence, iteration)
    if apart:
        assert here.place != Vote(Occasion.WINDOW, sequence, iteration + apart).place
        assert here.place != Vote(Occasion.WINDOW, sequence + apart, iteration).place
    assert 0 <= here.place < 1 << 20


@given(st.lists(st.integers(0, MOST_DOUBLINGS), min_size=1, max_size=8))
def test_the_least_of_the_doublings_is_read_from_their_sum(doublings: list[int]) -> None:
    result = result_of(*(Vote(Occasion.WINDOW, 0, doublings=each) for each in doublings), iterations=0)
    assert result.least_doublings(len(doublings)) == min(doublings)


@pytest.mark.parametrize(
    ("counts", "same"), [((0, 0, 0), True), ((7, 7, 7), True), ((7, 8, 7), False), ((0, 1, 2), False)]
)
def test_ranks_see_whether_they_made_the_same_number_of_backward_passes(counts, same):
    result = result_of(*(Vote(Occasion.WINDOW, 0, backward_passes=each) for each in counts), iterations=0)
    assert result.same_backward_passes(3) is same
    assert result.backward_passes == sum(counts)


def test_ranks_see_whether_their_models_are_the_same():
    large = (1 << 60) + 12345
    alike = result_of(*(Vote(Occasion.EPOCH_END, 0, fingerprint=large) for _ in range(4)), iterations=0)
    apart = result_of(*(Vote(Occasion.EPOCH_END, 0, fingerprint=large + each) for each in (0, 0, 1)), iterations=0)
    assert (alike.same_fingerprints(4), apart.same_fingerprints(3)) == (True, False)


def test_a_changed_model_is_counted():
    result = result_of(*(Vote(Occasion.WINDOW, 0, model_changed=each) for each in (True, False, True)), iterations=0)
    assert result.model_changed == 2
