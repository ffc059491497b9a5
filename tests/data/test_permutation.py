from itertools import permutations
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allstep.data import Permutation, epoch_key
from allstep.errors import DataError

LARGEST = 2**62


def too_unlikely(observed: np.ndarray, expected: np.ndarray) -> bool:
    """Pearson's chi-square beyond five standard deviations (Wilson-Hilferty's normal approximation)."""
    degrees = observed.size - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    return abs(z) > 5


def ordered(n: int, seed: int) -> np.ndarray:
    return Permutation(n, seed)(np.arange(n))


def test_every_item_comes_exactly_once_at_every_small_length() -> None:
    for n in [*range(600), 1023, 1024, *range(1025, 1500), 2047, 2048, 2049, 4097, 65_537]:
        assert np.array_equal(np.sort(ordered(n, seed=7)), np.arange(n)), n


@given(n=st.integers(1, 20_000), seed=st.integers(-(2**70), 2**70))
@settings(max_examples=60, deadline=None)
def test_any_length_and_seed_gives_a_bijection(n: int, seed: int) -> None:
    order = ordered(n, seed)
    assert np.bincount(order, minlength=n).tolist() == [1] * n
    assert np.array_equal(Permutation(n, seed).inverse(order), np.arange(n))


@given(n=st.integers(1, LARGEST), seed=st.integers(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_one_index_equals_many_and_the_inverse_leads_back(n: int, seed: int, data: st.DataObject) -> None:
    permutation = Permutation(n, seed)
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8))
    items = permutation(indices)
    assert items.dtype == np.int64
    assert items.tolist() == [permutation[i] for i in indices]
    assert all(0 <= item < n for item in items.tolist())
    assert permutation.inverse(items).tolist() == indices
    assert [permutation.inverse(item) for item in items.tolist()] == indices


def test_the_largest_length_works_at_both_ends() -> None:
    permutation = Permutation(LARGEST, 1)
    assert len(permutation) == LARGEST
    ends = np.array([0, 1, LARGEST - 2, LARGEST - 1])
    items = permutation(ends)
    assert len(set(items.tolist())) == 4
    assert np.array_equal(permutation.inverse(items), ends)


@pytest.mark.parametrize("n", [-1, LARGEST + 1])
def test_a_length_out_of_range_is_an_error_that_names_it(n: int) -> None:
    with pytest.raises(DataError, match=f"n is {n}"):
        Permutation(n, 0)


@pytest.mark.parametrize("n", [0, 3, 5000])
def test_indices_outside_the_order_are_index_errors(n: int) -> None:
    permutation = Permutation(n, 0)
    for index in (-1, n):
        with pytest.raises(IndexError, match=str(index)):
            permutation[index]
        with pytest.raises(IndexError, match=str(index)):
            permutation.inverse(index)
        with pytest.raises(IndexError, match="must lie in"):
            permutation([index])


def test_fractions_are_refused() -> None:
    with pytest.raises(IndexError, match="float64"):
        Permutation(10, 0)([0.5])


@pytest.mark.parametrize("n", [100, 5000])
def test_shapes_are_kept_and_numpy_integers_are_taken(n: int) -> None:
    permutation = Permutation(n, 0)
    grid = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert permutation(grid).shape == (3, 4)
    assert permutation(grid)[2, 3] == permutation[np.int64(11)]
    assert permutation.inverse(np.int64(permutation[5])) == 5
    assert permutation([]).shape == (0,)


def test_the_order_stays_what_it_was_in_earlier_releases() -> None:
    """A saved place is only valid in the same order: change the sampler state's version with these numbers."""
    assert Permutation(10, 0)(np.arange(10)).tolist() == [3, 8, 0, 1, 5, 7, 9, 6, 2, 4]
    assert Permutation(10**6, 1)(np.arange(4)).tolist() == [813699, 92355, 338047, 389260]
    assert Permutation(10**15, 2)(np.arange(2)).tolist() == [866548770828127, 927258065219467]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_items_are_equally_likely(n: int) -> None:
    place = {order: i for i, order in enumerate(permutations(range(n)))}
    seeds = 60 * factorial(n) + 2000
    seen = np.bincount([place[tuple(ordered(n, seed).tolist())] for seed in range(seeds)], minlength=len(place))
    assert not too_unlikely(seen, np.full(len(place), seeds / len(place)))


@pytest.mark.parametrize("n", [7, 16, 37, 64, 1024, 1025, 2048, 3000, 100_003, 2**40 + 1])
def test_each_place_holds_each_item_equally_often_over_seeds(n: int) -> None:
    seeds, bins = 3000, min(n, 30)
    places = np.array([0, 1, n // 2, n - 1])
    items = np.stack([Permutation(n, seed)(places) for seed in range(seeds)])
    edges = np.array([-(-n * i // bins) for i in range(bins + 1)])
    expected = np.diff(edges) / n * seeds
    for column in items.T:
        seen = np.bincount(np.searchsorted(edges, column, side="right") - 1, minlength=bins)
        assert not too_unlikely(seen, expected)


@pytest.mark.parametrize("n", [64, 1025, pytest.param(2048, marks=pytest.mark.nightly)])
def test_two_places_hold_each_pair_of_items_equally_often(n: int) -> None:
    seeds, bins = 4000, 6
    half = 1 << ((n - 1).bit_length() // 2)
    group = np.bincount(np.arange(n) * bins // n, minlength=bins).astype(float)
    expected = (np.outer(group, group) - np.diag(group)) / (n * (n - 1)) * seeds
    for pair in ([0, 1], [0, half], [n - 2, n - 1]):
        binned = np.stack([Permutation(n, seed)(pair) for seed in range(seeds)]) * bins // n
        seen = np.bincount(binned[:, 0] * bins + binned[:, 1], minlength=bins * bins)
        assert not too_unlikely(seen, expected.ravel())


@pytest.mark.parametrize("n", [1000, 1025, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_neighbours_in_the_order_are_not_correlated(n: int) -> None:
    orders = np.stack([ordered(n, seed) for seed in range(200)]) - (n - 1) / 2
    serial = (orders[:, 1:] * orders[:, :-1]).sum(axis=1) / (orders**2).sum(axis=1)
    assert abs(serial.mean()) < 5 / (n * len(orders)) ** 0.5
    assert serial.std() * n**0.5 == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("n", [1000, 1025, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_orders_of_consecutive_epochs_and_seeds_are_not_correlated(n: int) -> None:
    by_epoch = [ordered(n, epoch_key(3, epoch)) for epoch in range(200)]
    by_seed = [ordered(n, epoch_key(seed, 3)) for seed in range(200)]
    for orders in (np.stack(by_epoch) - (n - 1) / 2, np.stack(by_seed) - (n - 1) / 2):
        correlation = (orders[1:] * orders[:-1]).sum(axis=1) / (orders[0] ** 2).sum()
        assert abs(correlation.mean()) < 5 / (n * len(orders)) ** 0.5
        assert correlation.std() * n**0.5 == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("n", [1024, pytest.param(2048, marks=pytest.mark.nightly)])
def test_fixed_points_are_as_rare_as_chance_has_them(n: int) -> None:
    fixed = np.array([(ordered(n, seed) == np.arange(n)).sum() for seed in range(3000)])
    assert fixed.mean() == pytest.approx(1, abs=0.1)
    assert fixed.var() == pytest.approx(1, abs=0.17)
