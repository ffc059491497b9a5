"""`allstep.errors`: the table of types says what the code says, and errors travel whole between processes."""

from __future__ import annotations

import inspect
import pickle

import pytest

from allstep import errors


def _types() -> list[type[BaseException]]:
    return [each for each in vars(errors).values() if inspect.isclass(each) and each.__module__ == errors.__name__]


def _table() -> dict[str, str]:
    rows = [line.strip("| ").split(" | ") for line in inspect.getdoc(errors).splitlines() if line.startswith("| ")]
    return {name: bases for name, _, bases in rows[2:]}


def test_the_table_names_every_type_once_with_its_other_bases() -> None:
    expected = {}
    for each in _types():
        bases = [base.__name__ for base in each.__bases__ if base is not errors.AllstepError]
        expected[each.__name__] = ", ".join(bases)
    assert _table() == expected


def test_every_type_but_those_of_a_good_end_is_an_allstep_error() -> None:
    outside = [each for each in _types() if not issubclass(each, errors.AllstepError)]
    assert set(outside) == {errors.Cancelled, errors.Preempted}


@pytest.mark.parametrize(
    ("error", "attributes"),
    [
        (errors.PlacementError("why", variable="RANK", value="x"), {"variable": "RANK", "value": "x"}),
        (errors.UnevenDataError("why", counts=(1, 2)), {"counts": (1, 2)}),
    ],
)
def test_an_error_with_attributes_keeps_them_when_pickled(error: Exception, attributes: dict[str, object]) -> None:
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert str(twin) == "why"
    assert vars(twin) == attributes
