"""Whether the ranks that arrived fit together: a pure decision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from allstep.world.roll_call import Arrival, objection

FIRST = Arrival(0, 2, "a", 10, "cuda", "nccl", "GPU-1")
SECOND = Arrival(1, 2, "b", 11, "cuda", "nccl", "GPU-2")


def test_ranks_that_fit_are_let_through():
    assert objection([FIRST, SECOND]) == ""


@pytest.mark.parametrize(
    ("second", "fragments"),
    [
        (replace(SECOND, world_size=3), ["ranks 0 and 1 disagree about world_size", "process 11 on b"]),
        (replace(SECOND, backend="gloo"), ["disagree about backend", "'nccl'", "'gloo'"]),
        (replace(SECOND, accelerator="GPU-1"), ["ranks 0 and 1", "same CUDA device, GPU-1", 'backend="gloo"']),
    ],
)
def test_what_does_not_fit_is_named(second, fragments):
    text = objection([FIRST, second])
    for fragment in fragments:
        assert fragment in text


def test_gloo_may_share_a_device():
    shared = [replace(each, backend="gloo", accelerator="GPU-1") for each in (FIRST, SECOND)]
    assert objection(shared) == ""


def test_an_arrival_survives_the_store():
    assert Arrival.from_json(FIRST.to_json().encode()) == FIRST
