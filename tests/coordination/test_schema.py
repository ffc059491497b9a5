"""Schemas are compared, and their first difference is told by metric, state and ranks."""

from __future__ import annotations

import pytest

from allstep.coordination import StateLine, check_schemas, fingerprint
from allstep.coordination.compare import first_difference
from allstep.errors import MetricMismatchError

ONE = StateLine("EPOCH_COMPLETED", "accuracy", "tp", "sum, int64, shape (10,)")
OTHER = StateLine("EPOCH_COMPLETED", "loss", "total", "sum, float64, shape ()")


def test_equal_schemas_have_no_difference_and_one_fingerprint() -> None:
    assert first_difference([(ONE, OTHER)] * 3) is None
    assert first_difference([(), ()]) is None
    assert fingerprint((ONE, OTHER)) == fingerprint((ONE, OTHER))
    check_schemas([(ONE,), (ONE,)])


@pytest.mark.parametrize("field", ["event", "metric", "state", "form"])
def test_any_field_changes_the_fingerprint(field: str) -> None:
    changed = (ONE._replace(**{field: "other"}),)
    assert fingerprint(changed) != fingerprint((ONE,))
    assert 0 <= fingerprint(changed) < 2**63


def test_order_changes_the_fingerprint() -> None:
    assert fingerprint((ONE, OTHER)) != fingerprint((OTHER, ONE))


def test_a_state_of_another_form_is_told_by_its_forms() -> None:
    told = first_difference([(ONE,), (ONE._replace(form="sum, int64, shape (5,)"),), (ONE,)])
    assert told == (
        "metric 'accuracy', state 'tp', at EPOCH_COMPLETED, is sum, int64, shape (10,) on ranks 0, 2; "
        "sum, int64, shape (5,) on rank 1"
    )


def test_other_states_and_missing_ones_are_told_by_their_place() -> None:
    told = first_difference([(ONE, OTHER), (ONE, ONE), (ONE,)])
    assert told is not None
    assert told.startswith("state number 2 is metric 'loss', state 'total', at EPOCH_COMPLETED on rank 0; ")
    assert told.endswith("no further state on rank 2")
    with pytest.raises(MetricMismatchError, match="state number 2"):
        check_schemas([(ONE, OTHER), (ONE,)])
