"""Schemas are compared, and their first difference is told by metric, state and ranks."""

from __future__ import annotations

import pytest

from allstep.coordination import check_same
from allstep.errors import MetricMismatchError
from allstep.metrics.describe import Schema, StateLine

ONE = StateLine("EPOCH_COMPLETED", "accuracy", "tp", "sum, int64, shape (10,)")
OTHER = StateLine("EPOCH_COMPLETED", "loss", "total", "sum, float64, shape ()")


def told_difference(*schemas: Schema) -> str:
    with pytest.raises(MetricMismatchError, match="ranks reduce different metrics: ") as caught:
        check_same(schemas)
    return str(caught.value).removeprefix("ranks reduce different metrics: ")


def test_a_state_of_another_form_is_told_by_its_forms() -> None:
    told = told_difference((ONE,), (ONE._replace(form="sum, int64, shape (5,)"),), (ONE,))
    assert told == (
        "metric 'accuracy', state 'tp', at EPOCH_COMPLETED, is sum, int64, shape (10,) on ranks 0, 2; "
        "sum, int64, shape (5,) on rank 1. Attach the same metrics, made with the same arguments, in the same order "
        "on every rank"
    )


def test_other_states_and_missing_ones_are_told_by_their_place() -> None:
    told = told_difference((ONE, OTHER), (ONE, ONE), (ONE,))
    assert told.startswith("state number 2 is metric 'loss', state 'total', at EPOCH_COMPLETED on rank 0; ")
    assert "no further state on rank 2. " in told
    assert told_difference((ONE, OTHER), (ONE,)).startswith("state number 2 is")
    assert told_difference((), (ONE,)).startswith("state number 1 is no further state on rank 0; ")
