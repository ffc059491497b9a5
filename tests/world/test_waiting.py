"""What a rank waits in is named after the line that waits."""

from __future__ import annotations

import inspect

import pytest

from allstep.protocol.heartbeat import RankActivity
from allstep.world.collectives import Waits


class Door:
    """Stands for World: its methods are what the user calls."""

    def __init__(self) -> None:
        self.pulse = RankActivity()
        self._meetings = Waits(self.pulse)
        self.seen: list[str] = []

    def meet(self) -> None:
        with self._waits("barrier"):
            self.seen.append(self.pulse.waiting)

    def fail(self) -> None:
        with self._waits("gather_objects"):
            raise KeyError("in the meeting")

    def _waits(self, name: str):
        return self._meetings.at(name, 1)


def test_a_wait_has_a_name_a_number_and_the_users_line():
    door = Door()
    here = inspect.currentframe()
    door.meet(); first = here.f_lineno  # fmt: skip # noqa: E702
    door.meet()
    assert door.seen == [f"barrier #1 at test_waiting.py:{first}", f"barrier #2 at test_waiting.py:{first + 1}"]
    assert door.pulse.waiting == ""


def test_a_wait_that_raises_is_over():
    door = Door()
    with pytest.raises(KeyError):
        door.fail()
    assert door.pulse.waiting == ""


def test_a_wait_that_no_line_of_the_users_began_has_no_line():
    waits = Waits(RankActivity())
    with waits.at("close", 10_000):
        assert waits._pulse.waiting == "close #1"
