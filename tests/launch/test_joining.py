"""Who may join a run of several machines, and what the machines say to each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from allstep.errors import ChannelError
from allstep.launch.join_protocol import CODEC, Join, Over, Refused, Resigned, Roster, Start, Waiting, token

HEAD = Join("exp", token("exp", ""), 3, 0, 2, "h0", 10, {"the script": "train.py"})


def node(rank: int, **changes: object) -> Join:
    return replace(HEAD, node_rank=rank, host=f"h{rank}", pid=10 + rank, **changes)  # type: ignore[arg-type]


def roster(*joins: Join) -> Roster:
    made = Roster(HEAD)
    for join in joins:
        assert not made.objection(join)
        made.joined[join.node_rank] = join
    return made


@pytest.mark.parametrize(
    "message",
    [
        HEAD,
        Waiting(),
        Resigned("t", 1, "x"),
        Start("exp", 3, "n0", 1, 2, 4, 8, 5),
        Over(3, "done"),
        Refused("no", stranger=True),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_arrives_as_it_was_sent(message: Join | Waiting | Start | Over | Refused | Resigned) -> None:
    line = CODEC.encode(message)
    assert line.count(b"\n") == 1
    assert CODEC.decode(line) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"GET / HTTP/1.1",
        b"[]",
        b"{}",
        b'{"v": 2}',
        b'{"v": 2, "type": "Nothing"}',
        b'{"v": 2, "type": "Over", "status": 1}',
        CODEC.encode(HEAD).replace(b'"nodes":3', b'"nodes":"3"'),
        CODEC.encode(HEAD).replace(b'"facts":{"the script":"train.py"}', b'"facts":{"the script":3}'),
        b"\xff\xfe",
    ],
)
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(ChannelError):
        CODEC.decode(line)


def test_another_version_is_named() -> None:
    with pytest.raises(ChannelError, match="version 1 of joining, and this is version 2"):
        CODEC.decode(CODEC.encode(Waiting()).replace(b'"v":2', b'"v":1'))


def test_ranks_are_counted_through_the_machines_in_their_order_whatever_each_has() -> None:
    made = roster(node(2, workers=1), node(1, workers=4))
    assert made.missing() == ()
    assert made.first_ranks() == {0: 0, 1: 2, 2: 6}
    assert made.world_size() == 7


def test_machines_that_have_not_come_are_known_by_rank() -> None:
    assert roster().missing() == (1, 2)
    assert roster(node(2)).missing() == (1,)


def test_two_machines_of_one_rank_are_named_both_and_the_same_one_may_come_again() -> None:
    made = roster(node(1))
    assert made.objection(node(1)) == ""
    assert made.objection(replace(node(1), pid=99)) == (
        "two supervisors are node 1: pid 11 on h1 and pid 99 on h1; give each machine its own --node-rank"
    )
    assert "two supervisors are node 0: pid 10 on h0 and pid 13 on h3" in made.objection(replace(node(3), node_rank=0))


@pytest.mark.parametrize(
    ("join", "words"),
    [
        (node(1, nodes=4), "node 1 (pid 11 on h1) was started with --nnodes 4, node 0 (pid 10 on h0) with --nnodes 3"),
        (node(1, workers=0), "says that it has 0 workers"),
        (node(3), "says node rank 3, but there are 3 nodes"),
        (
            node(1, facts={"the script": "other.py"}),
            "nodes disagree about the script: train.py on node 0 (h0), other.py on node 1 (h1)",
        ),
        (node(1, facts={}), "nodes disagree about the script: train.py on node 0 (h0), not set on node 1 (h1)"),
    ],
)
def test_what_differs_is_named_with_both_values(join: Join, words: str) -> None:
    assert words in roster().objection(join)


def test_another_run_or_another_secret_is_a_stranger() -> None:
    made = roster()
    assert not made.is_stranger(node(1))
    assert made.is_stranger(node(1, run="other", token=token("other", "")))
    assert made.is_stranger(node(1, token=token("exp", "secret")))
    assert "the port is that of run 'exp' (pid 10 on h0), and this is run 'other'" in made.turned_away(
        node(1, run="other")
    )
