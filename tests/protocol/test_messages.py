"""Messages survive the wire, and nothing else passes for one."""

from __future__ import annotations

import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allstep.errors import ChannelError
from allstep.protocol.messages import (
    VERSION,
    AskStacks,
    Beat,
    Bye,
    Failure,
    Finish,
    Hello,
    Leave,
    Message,
    NodeBeat,
    NodeHello,
    Notice,
    RankLost,
    Refused,
    Stacks,
    Welcome,
    Withdraw,
    WorkerEnded,
    decode,
    encode,
)
from allstep.protocol.worker_exit import WorkerExit
from tests.monitor.driving import arrival

EXAMPLES: list[Message] = [
    Hello("nonce", 1, arrival(1, accelerator="GPU-1", facts={"lr": "1"}), "/tmp/stacks", 5.0),
    Hello("nonce", 1, arrival(1)),
    Beat(3, 0, 9, 1, 7, "step", 0.25, "gradients", "trainer", {"step": 1.5, "data": 2}, 0.01),
    Failure(0, 0, 1, "ValueError", "schlecht: ü\n", "Traceback ...\n", 1, 2, "step", True, "cuda:0"),
    Stacks(1, "Thread ...", "all_reduce #3"),
    Bye(1),
    Bye(1, closed=False),
    Withdraw(1),
    Welcome(),
    Refused("why"),
    Leave("why", None),
    Leave("why", 84, "report", 2, (1, 3)),
    Notice("slow", 1),
    AskStacks(),
    NodeHello("nonce", 0, 1, "host", (8, 9)),
    NodeBeat(),
    WorkerEnded(WorkerExit(1, -9, True, "words", "a note")),
    RankLost(1, "why"),
    Finish("text", 1),
]


def test_there_is_an_example_of_every_message():
    assert {type(each) for each in EXAMPLES} == set(typing.get_args(Message))


@pytest.mark.parametrize("message", EXAMPLES)
def test_a_message_survives_the_wire_as_one_line(message):
    line = encode(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode(line) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"GET / HTTP/1.1",
        b"[]",
        b"17",
        b"\xff\xfe",
        b'{"type":"Bye","rank":1}',
        b'{"v":1,"type":"Nothing"}',
        b'{"v":1,"type":["Bye"],"rank":1}',
        b'{"v":1,"type":"Bye"}',
        b'{"v":1,"type":"Bye","rank":"1"}',
        b'{"v":1,"type":"Bye","rank":true}',
        b'{"v":1,"type":"Hello","nonce":"n","attempt":0,"arrival":[]}',
        b'{"v":1,"type":"NodeHello","nonce":"n","attempt":0,"node_rank":0,"host":"a","ranks":["x"]}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_message_is_an_error(line):
    with pytest.raises(ChannelError):
        decode(line)


def test_another_version_is_an_error_that_says_so():
    with pytest.raises(ChannelError, match=r"version 2 .* this is version 1"):
        decode(b'{"v":2,"type":"Welcome"}')


def test_what_a_newer_side_adds_is_passed_over():
    assert decode(json.dumps({"v": VERSION, "type": "Bye", "rank": 1, "mood": "good"}).encode()) == Bye(1)


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_raise_the_one_error(line):
    with pytest.raises(ChannelError):
        decode(line)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(EXAMPLES), st.data())
def test_a_field_of_any_other_kind_is_refused_or_has_its_type(message, data):
    body = json.loads(encode(message))
    name = data.draw(st.sampled_from(sorted(body)))
    body[name] = data.draw(_values)
    try:
        decoded = decode(json.dumps(body).encode())
    except ChannelError:
        return
    assert decode(encode(decoded)) == decoded or body[name] != body[name] or "NaN" in json.dumps(body)
