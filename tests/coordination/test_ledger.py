"""What a window agreed, decided from a tally alone."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allstep.coordination import (
    POLICIES,
    Occasion,
    Uneven,
    Vote,
    VoteResult,
    agree_length,
    agree_window,
    next_window,
    read_result,
    vector_length,
)

counts = st.none() | st.integers(0, 9)


def result_of(rows: list[list[int | None]]) -> VoteResult:
    iterations = len(rows[0])
    vectors = [Vote(Occasion.WINDOW, 0, 0, row).vector(vector_length(iterations)) for row in rows]
    return read_result([sum(column) for column in zip(*vectors, strict=True)], iterations)


def rows_of(*batches: int, iterations: int, samples: int = 2) -> list[list[int | None]]:
    return [[samples if at < n else None for at in range(iterations)] for n in batches]


@pytest.mark.parametrize("policy", ["shortest", "error"])
def test_a_pass_ends_where_the_first_rank_runs_out(policy: Uneven) -> None:
    ledger = agree_window(result_of(rows_of(10, 7, 9, iterations=12)), policy, 3, 1, group_goes_on=False)
    assert (ledger.iterations, ledger.ends_pass, ledger.is_uneven) == (7, True, True)
    assert ledger.group_totals == (6,) * 7


def test_under_longest_a_pass_ends_where_the_last_rank_runs_out() -> None:
    ledger = agree_window(result_of(rows_of(10, 7, 9, iterations=12)), "longest", 3, 1, group_goes_on=False)
    assert (ledger.iterations, ledger.ends_pass, ledger.is_uneven) == (10, True, False)
    assert ledger.group_totals == (6,) * 7 + (4, 4, 2)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pass_goes_on_while_every_rank_has_a_batch(policy: Uneven) -> None:
    ledger = agree_window(result_of(rows_of(8, 8, iterations=8)), policy, 2, 4, group_goes_on=True)
    assert (ledger.iterations, ledger.ends_pass, ledger.is_uneven) == (8, False, False)
    assert ledger.group_totals == (16, 16)


def test_ranks_that_run_out_together_are_not_uneven() -> None:
    ledger = agree_window(result_of(rows_of(5, 5, iterations=8)), "error", 2, 1, group_goes_on=False)
    assert (ledger.iterations, ledger.ends_pass, ledger.is_uneven) == (5, True, False)


def test_a_batch_of_no_sample_does_not_end_a_pass() -> None:
    ledger = agree_window(result_of([[2, 1], [2, 0]]), "shortest", 2, 1, group_goes_on=False)
    assert (ledger.iterations, ledger.ends_pass) == (2, False)
    assert [ledger.weight(1, n, 2) for n in (1, 0)] == [2.0, 0.0]


def test_a_group_cut_by_the_end_of_data_is_short_or_waits_for_the_next_pass() -> None:
    result = result_of(rows_of(6, 6, iterations=8))
    short = agree_window(result, "shortest", 2, 4, group_goes_on=False)
    assert (short.iterations, short.group_totals) == (6, (16, 8))
    assert [short.ends_group(at) for at in range(6)] == [False, False, False, True, False, True]
    waiting = agree_window(result, "shortest", 2, 4, group_goes_on=True)
    assert (waiting.iterations, waiting.ends_pass, waiting.group_totals) == (4, True, (16,))


def test_batches_that_waited_are_run_when_nothing_follows_them() -> None:
    result = result_of(rows_of(2, 2, iterations=8))
    assert agree_window(result, "shortest", 2, 4, group_goes_on=True, carried=2).iterations == 2
    assert agree_window(result, "shortest", 2, 4, group_goes_on=True, carried=1).iterations == 0


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[list[int | None]], int]:
    group = draw(st.integers(1, 4))
    iterations = group * draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(counts, min_size=iterations, max_size=iterations), min_size=1, max_size=5))
    return rows, group


@given(worlds(), st.sampled_from(POLICIES), st.booleans())
def test_the_weighted_mean_over_ranks_is_the_mean_over_all_samples(
    world: tuple[list[list[int | None]], int], policy: Uneven, goes_on: bool
) -> None:
    rows, group = world
    ledger = agree_window(result_of(rows), policy, len(rows), group, group_goes_on=goes_on)
    for begin in range(0, ledger.iterations, group):
        taken = range(begin, min(begin + group, ledger.iterations))
        samples = [row[at] or 0 for row in rows for at in taken]
        total = sum(samples)
        shares = [ledger.weight(at, row[at] or 0, len(rows)) / len(rows) for row in rows for at in taken]
        wanted = [Fraction(n, total) if total else Fraction(0) for n in samples]
        assert shares == pytest.approx([float(share) for share in wanted], rel=1e-12)
        assert math.fsum(shares) == pytest.approx(1.0 if total else 0.0)


@given(worlds(), st.sampled_from(POLICIES), st.booleans(), st.integers(0, 3))
def test_a_window_runs_a_prefix_that_the_policy_allows_in_groups(
    world: tuple[list[list[int | None]], int], policy: Uneven, goes_on: bool, carried: int
) -> None:
    rows, group = world
    iterations = len(rows[0])
    ledger = agree_window(result_of(rows), policy, len(rows), group, group_goes_on=goes_on, carried=carried)
    enough = any if policy == "longest" else all
    runs = [enough(row[at] is not None for row in rows) for at in range(iterations)]
    there = [*runs, False].index(False)
    assert ledger.ends_pass == (there < iterations)
    if goes_on and ledger.ends_pass and there > carried:
        assert ledger.iterations == there // group * group
    else:
        assert ledger.iterations == there
    assert len(ledger.group_totals) == -(-ledger.iterations // group)
    ends = [at for at in range(ledger.iterations) if ledger.ends_group(at)]
    assert len(ends) == len(ledger.group_totals)
    assert not ends or ends[-1] == ledger.iterations - 1


@given(st.integers(1, 64), st.integers(0, 10**9), st.integers(1, 64), st.integers(1, 64))
def test_a_window_stays_in_bounds_and_at_most_doubles(groups: int, microseconds: int, size: int, longest: int) -> None:
    after = next_window(groups, microseconds, size, longest)
    assert 1 <= after <= longest
    assert after <= 2 * groups


def test_windows_grow_while_short_shrink_when_long_and_rest_in_between() -> None:
    grown = [1]
    for _ in range(7):
        grown.append(next_window(grown[-1], 1000, 2, 32))
    assert grown == [1, 2, 4, 8, 16, 32, 32, 32]
    assert next_window(8, 2 * 1_500_000, 2, 32) == 4
    assert next_window(8, 2 * 700_000, 2, 32) == 8
    assert next_window(1, 2 * 9_000_000, 2, 32) == 1


@given(st.lists(st.none() | st.integers(0, 40), min_size=1, max_size=5), st.sampled_from(POLICIES))
def test_a_length_is_agreed_only_when_every_rank_knows_its_own(lengths: list[int | None], policy: Uneven) -> None:
    agreed = agree_length(lengths, policy)
    if None in lengths:
        assert agreed is None
    else:
        known = [n for n in lengths if n is not None]
        assert agreed == (max(known) if policy == "longest" else min(known))
