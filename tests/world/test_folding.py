"""Reducing one number from each rank."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allstep.world.collectives import fold

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("numbers", "op", "result"),
    [
        ([2**53 + 1, 2**53 + 1], "sum", 2**54 + 2),
        ([2**62, 2**62, 2**62], "sum", 3 * 2**62),
        ([2**40, 2**40], "product", 2**80),
        ([1, 2], "mean", 1.5),
        ([2**63 - 1, 2**63 - 1], "mean", float(2**63)),
        ([3, 1.5], "sum", 4.5),
        ([1e100, 1.0, -1e100], "sum", 1.0),
        ([True, True], "sum", 2),
        ([True, False], "min", False),
        ([3, -2], "min", -2),
        ([3, -2], "max", 3),
        ([INF, 1.0], "sum", INF),
        ([1.7e308, 1.7e308], "sum", INF),
    ],
)
def test_fold(numbers, op, result):
    folded = fold(numbers, op)
    assert folded == result
    assert type(folded) is type(result)


@pytest.mark.parametrize(("numbers", "op"), [([INF, -INF], "sum"), ([1.0, NAN], "min"), ([NAN, 1], "max")])
def test_what_is_no_number_stays_visible(numbers, op):
    assert math.isnan(fold(numbers, op))


@given(st.lists(st.floats(-1e200, 1e200), min_size=1, max_size=20))
def test_a_sum_of_floats_is_the_exact_sum_rounded_once_in_any_order(numbers):
    exact = float(sum(map(Fraction, numbers)))
    assert fold(numbers, "sum") == exact
    assert fold(numbers[::-1], "sum") == exact
