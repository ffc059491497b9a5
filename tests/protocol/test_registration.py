"""Whether the ranks that arrived fit together: a pure decision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from allstep.protocol.registration import RankRegistration, absent, objection, spans

FIRST = RankRegistration(0, 2, "a", 10, "cuda", "nccl", "GPU-1", facts={"seed": "1"})
SECOND = RankRegistration(1, 2, "b", 11, "cuda", "nccl", "GPU-2", facts={"seed": "1"})


def test_ranks_that_fit_are_let_through():
    assert objection([FIRST, SECOND]) == ""


@pytest.mark.parametrize(
    ("second", "fragments"),
    [
        (
            replace(SECOND, world_size=3),
            ["ranks 0 and 1 disagree about world_size: 2 in process 10 on a, 3 in process"],
        ),
        (replace(SECOND, backend="gloo"), ["disagree about backend", "'nccl'", "'gloo'"]),
        (replace(SECOND, accelerator="GPU-1"), ["ranks 0 and 1", "same CUDA device, GPU-1", 'backend="gloo"']),
        (replace(SECOND, rank=0), ["two processes are rank 0: process 10 on a and process 11 on b"]),
        (replace(SECOND, rank=2), ["process 11 on b says it is rank 2 of a world of 2"]),
        (replace(SECOND, rank=-1), ["says it is rank -1"]),
        (replace(SECOND, facts={"seed": "2"}), ["disagree about seed (rank 0: '1'; rank 1: '2')"]),
        (replace(SECOND, facts={}), ["disagree about seed (rank 0: '1'; rank 1: not set)"]),
    ],
)
def test_what_does_not_fit_is_named(second, fragments):
    text = objection([FIRST, second])
    for fragment in fragments:
        assert fragment in text


def test_a_world_of_another_size_than_was_started_is_named():
    assert "rank 0 (process 10 on a) takes the world to have 2 ranks, and 4 were started" in objection([FIRST], 4)


def test_gloo_may_share_a_device():
    assert objection([replace(each, backend="gloo", accelerator="GPU-1") for each in (FIRST, SECOND)]) == ""


def test_ranks_with_the_same_value_are_named_together():
    many = [replace(FIRST, rank=rank, world_size=6, accelerator=None, facts={"lr": "1"}) for rank in range(6)]
    many[4] = replace(many[4], facts={"lr": "2"})
    assert "(ranks 0-3, 5: '1'; rank 4: '2')" in objection(many)


def test_who_is_absent_is_named():
    assert absent([FIRST, SECOND], 2, 5) == ""
    assert absent([SECOND], 4, 5).startswith("3 of 4 ranks did not arrive within 5 s: 0, 2-3;")


def test_many_ranks_are_named_in_one_line():
    assert spans(range(0, 4096, 2)).endswith("30, ...")
    assert spans([]) == ""
