"""Which machines may join a run, and which ranks each gets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from allstep.launch.join_protocol import JoinedNodes
from allstep.protocol.messages import JoinRequest

HEAD = JoinRequest(3, 0, 2, "h0", 10, {"the script": "train.py"})


def node(rank: int, **changes: object) -> JoinRequest:
    return replace(HEAD, node_rank=rank, host=f"h{rank}", pid=10 + rank, **changes)  # type: ignore[arg-type]


def joined(*requests: JoinRequest) -> JoinedNodes:
    made = JoinedNodes(HEAD)
    for request in requests:
        assert not made.objection(request)
        made.requests[request.node_rank] = request
    return made


def test_ranks_are_counted_through_the_machines_in_their_order() -> None:
    made = joined(node(2, workers=1), node(1, workers=4))
    assert made.missing() == ()
    assert made.first_ranks() == {0: 0, 1: 2, 2: 6}
    assert made.world_size() == 7


def test_machines_that_have_not_come_are_known_by_rank() -> None:
    assert joined().missing() == (1, 2)
    assert joined(node(2)).missing() == (1,)


def test_two_machines_of_one_rank_are_both_named_and_one_may_come_again() -> None:
    made = joined(node(1))
    assert made.objection(node(1)) == ""
    assert made.objection(replace(node(1), pid=99)) == (
        "two supervisors are node 1: pid 11 on h1 and pid 99 on h1; give each machine its own --node-rank"
    )
    assert "two supervisors are node 0: pid 10 on h0 and pid 13 on h3" in made.objection(replace(node(3), node_rank=0))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (node(1, nodes=4), "node 1 (pid 11 on h1) was started with --nnodes 4, node 0 (pid 10 on h0) with --nnodes 3"),
        (node(1, workers=0), "says that it has 0 workers"),
        (node(1, workers=1 << 40), "says that it has 1099511627776 workers"),
        (node(3), "says node rank 3, but there are 3 nodes"),
        (
            node(1, facts={"the script": "other.py"}),
            "nodes disagree about the script: train.py on node 0 (h0), other.py on node 1 (h1)",
        ),
        (node(1, facts={}), "nodes disagree about the script: train.py on node 0 (h0), not set on node 1 (h1)"),
    ],
)
def test_what_differs_is_named_with_both_values(other: JoinRequest, words: str) -> None:
    assert words in joined().objection(other)
