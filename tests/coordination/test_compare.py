"""Descriptions are compared line by line; the first line that differs says the error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest

from allstep.coordination import by_ranks, check_same, fingerprint


class Line(NamedTuple):
    name: str
    value: str = ""

    def difference(self, at: int, lines: Sequence[Line | None]) -> Exception:
        return LookupError(f"{self.name}: line {at} is {by_ranks([str(line and line.value) for line in lines])}")


ONE, OTHER = Line("one", "1"), Line("other", "2")


def test_equal_descriptions_raise_nothing_and_have_one_fingerprint() -> None:
    check_same([(ONE, OTHER)] * 3)
    check_same([(), ()])
    check_same([])
    assert fingerprint((ONE, OTHER)) == fingerprint((ONE, OTHER))


@pytest.mark.parametrize("field", ["name", "value"])
def test_any_field_changes_the_fingerprint(field: str) -> None:
    changed = (ONE._replace(**{field: "else"}),)
    assert fingerprint(changed) != fingerprint((ONE,))
    assert 0 <= fingerprint(changed) < 2**63


def test_order_changes_the_fingerprint() -> None:
    assert fingerprint((ONE, OTHER)) != fingerprint((OTHER, ONE))


def test_the_first_differing_line_says_the_error() -> None:
    with pytest.raises(LookupError, match="one: line 1 is 1 on ranks 0, 2; 2 on rank 1"):
        check_same([(OTHER, ONE), (OTHER, OTHER), (OTHER, ONE)])


def test_a_rank_without_the_line_gets_the_error_of_one_that_has_it() -> None:
    with pytest.raises(LookupError, match="other: line 0 is None on rank 0; 2 on rank 1"):
        check_same([(), (OTHER,)])
