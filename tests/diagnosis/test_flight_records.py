"""What flight recorders of several ranks say together; dumps have the form of torch's version 2.10 of the recorder.

Stand-in where the entries are nccl's: recorded by hand after torch's sources, no GPU is asked.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from allstep.diagnosis.flight_records import compare, from_text, read_dump, summary, to_text


def entry(number: int, name: str = "nccl:all_reduce", over: bool = True, group: str = "default_pg", **rest: Any):
    return {
        "collective_seq_id": number,
        "profiling_name": name,
        "process_group": [str(rest.pop("id", 0)), group],
        "state": "completed" if over else "started",
        "retired": over,
        "input_sizes": [[8]],
        "is_p2p": False,
        **rest,
    }


def dump(*entries: dict[str, Any], config: dict[str, Any] | None = None) -> str:
    return json.dumps({"entries": entries, "pg_config": config or {}})


def said(*dumps: str) -> str:
    """What is said of ranks with these dumps, over the way that they take between processes."""
    return compare({rank: from_text(to_text(read_dump(each))) for rank, each in enumerate(dumps)})


WAITS = dump(entry(56, "nccl:all_gather"), entry(57, over=False), entry(58, over=False))


def test_the_ranks_that_did_not_issue_a_collective_are_named():
    behind = dump(entry(55), entry(56, "nccl:all_gather"))
    assert said(WAITS, WAITS, behind, WAITS) == (
        "ranks 0-1, 3 issued nccl:all_reduce of sizes [[8]] #57 of group default_pg, and rank 2 did not: its last one "
        "there was nccl:all_gather of sizes [[8]] #56"
    )
    assert said(WAITS, dump(entry(4, group="", id=3)), dump(entry(4, group="", id=3))).endswith("ranks 1-2 did not")


def test_different_collectives_under_one_number_are_named():
    other = dump(entry(57, "nccl:all_gather", over=False))
    assert said(WAITS, other) == (
        "under #57 of group default_pg rank 0 issued nccl:all_reduce of sizes [[8]], "
        "rank 1 issued nccl:all_gather of sizes [[8]]"
    )


def test_members_of_a_group_count_and_no_others():
    config = {"7": {"desc": "shard", "ranks": "[0, 1]"}}
    waits = dump(entry(3, over=False, group="shard", id=7), config=config)
    assert said(waits, dump(entry(9)), dump(entry(9))).endswith(
        "rank 0 issued nccl:all_reduce of sizes [[8]] #3 of group shard, and rank 1 did not"
    )


def test_a_vote_comes_after_the_collective_that_holds_it_up():
    vote = entry(8, "gloo:all_reduce", over=False, group="allstep agreement", id=1)
    behind = dump(entry(7, "gloo:all_reduce", group="allstep agreement", id=1), entry(56))
    first, second = said(dump(vote, entry(57, over=False)), behind).split("; ")
    assert "default_pg" in first
    assert "allstep agreement" in second


@pytest.mark.parametrize(
    "dumps",
    [
        (dump(entry(57)), dump(entry(57))),  # nobody waits
        (WAITS, WAITS),  # all wait in the same: the network, or a device
        (dump({**entry(57, over=False), "is_p2p": True}), dump(entry(1))),
        ("", "[]"),
        ('{"entries": 3}', '{"entries": [3]}'),
        (dump({"state": "started"}), dump(entry(1))),
    ],
)
def test_records_that_tell_nothing_say_nothing(dumps):
    assert said(*dumps) == ""


@pytest.mark.parametrize("text", ["", "no json", "[3]", '[{"name": "0"}]', '{"a": 1}'])
def test_a_text_that_is_no_record_is_done_without(text):
    assert from_text(text) == []


def test_the_collectives_that_are_not_over_are_shown():
    assert summary(dump(entry(11), entry(12, over=False))) == (
        "nccl:all_reduce #12 of group default_pg: started, sizes [[8]]"
    )
    assert summary(dump(entry(11))).endswith("completed, sizes [[8]]")
    assert summary("") == summary('{"entries": [3]}') == ""
