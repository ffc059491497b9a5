"""Which rank's end `run_ranks` reports, as a table."""

from __future__ import annotations

import pytest

from allstep.testing.call import Outcome
from allstep.testing.verdict import Ended, first_failure, is_settled

OWN = Outcome("raised", text="Traceback ...\nValueError: bad batch\n")
OTHERS = Outcome("raised", text="Traceback ...\nRuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:1\n")
DONE = Outcome("returned", value=3)


@pytest.mark.parametrize(
    ("ends", "first", "settled"),
    [
        ([Ended(0, DONE), Ended(1, DONE)], None, False),
        ([Ended(0, OTHERS)], 0, False),
        ([Ended(0, OTHERS), Ended(1, OWN)], 1, True),
        ([Ended(1, OWN), Ended(0, OWN)], 1, True),
        ([Ended(0, OTHERS), Ended(1, exit_code=-9)], 1, True),
        ([Ended(0, exit_code=-6), Ended(1, OWN)], 1, True),
        ([Ended(0, exit_code=-6)], 0, False),
        ([Ended(0, OTHERS), Ended(1, is_late=True)], 0, False),
        ([Ended(0, DONE), Ended(1, is_late=True)], 1, False),
        ([Ended(0, Outcome("unloadable", text="ImportError")), Ended(1, OTHERS)], 0, True),
    ],
)
def test_a_cause_comes_before_what_follows_from_it(ends: list[Ended], first: int | None, settled: bool) -> None:
    failure = first_failure(ends)
    assert (None if failure is None else failure.rank) == first
    assert is_settled(ends) is settled


def test_a_death_is_described_with_its_signal_and_stacks() -> None:
    text = Ended(1, exit_code=-11, stacks="Fatal Python error: Segmentation fault").describe(2)
    assert text == "rank 1 of 2 died with exit code -11 (SIGSEGV):\nFatal Python error: Segmentation fault"
