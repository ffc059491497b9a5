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
    AttemptStart,
    CheckpointSaved,
    Failure,
    FailureCaught,
    Finish,
    Goodbye,
    Heartbeat,
    JoinPending,
    JoinRequest,
    Leave,
    Message,
    NodeHeartbeat,
    NodeHello,
    NodeRemark,
    NodeResigned,
    Notice,
    ProcessSeen,
    RankEnding,
    RankHello,
    RankLost,
    Refused,
    RunOver,
    Stacks,
    Welcome,
    WorkerEnded,
    decode,
    encode,
)
from allstep.protocol.preflight_messages import (
    DeviceSums,
    LinkMeasured,
    LinkProbe,
    NodeFinding,
    PreflightOrder,
    StepDone,
)
from allstep.protocol.worker_exit import WorkerExit
from tests.monitor.driving import registration

EXAMPLES: list[Message] = [
    RankHello(1, registration(1, accelerator="GPU-1", facts={"lr": "1"}), "/tmp/stacks", 5.0),
    RankHello(1, registration(1)),
    Heartbeat(3, 0, 9, 1, 7, "step", 0.25, "gradients", "trainer", {"step": 1.5, "data": 2}, 0.01),
    Failure(0, 0, 1, "ValueError", "schlecht: ü\n", "Traceback ...\n", 1, 2, "step", True, "cuda:0"),
    Stacks(1, "Thread ...", "all_reduce #3"),
    CheckpointSaved(0, 40, 1.5, "s3://bucket/run/save-40"),
    Goodbye(1),
    Goodbye(1, True, 85),
    Goodbye(1, closed=False),
    FailureCaught(1),
    Welcome(),
    Refused("why"),
    Leave("why", None),
    Leave("why", 84, "report", 2, (1, 3)),
    Notice("slow", 1),
    AskStacks(),
    NodeHello(0, 1, "host", (8, 9)),
    NodeHeartbeat(2),
    RankEnding(WorkerExit(1, -9), registration(1), 1, 7, "step"),
    WorkerEnded(WorkerExit(1, -9, True, "words", "a note")),
    RankLost(1, "why"),
    ProcessSeen(2, "busy"),
    NodeRemark(2, "likely out of memory"),
    Finish("text", 1),
    JoinRequest(3, 0, 2, "h0", 10, {"the script": "train.py"}),
    JoinPending(),
    AttemptStart("exp", 3, "salt", 1, 2, 4, 8, 5),
    RunOver(3, "done"),
    NodeResigned(1, "x"),
    Refused("no", stranger=True),
    PreflightOrder(3, "links", 1, 4, "salt", "", 2, 8, 29500, {"0": "h0"}, {"0": "4711"}, (0, 2)),
    NodeFinding("folder", "bad", "full", "remove"),
    DeviceSums(1, "cpu", "abc", False, "why"),
    LinkMeasured(2, "", 1e-4, 1e8, 1e8, 0.01, 1500),
    StepDone(3, 1.5, 4711, 29500),
    LinkProbe(-1, "xxx", 0.5),
]

JOINS = next(each for each in EXAMPLES if isinstance(each, JoinRequest))


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
        b'{"type":"Goodbye","rank":1}',
        b'{"v":%d,"type":"Nothing"}' % VERSION,
        b'{"v":%d,"type":["Goodbye"],"rank":1}' % VERSION,
        b'{"v":%d,"type":"Goodbye"}' % VERSION,
        b'{"v":%d,"type":"Goodbye","rank":"1"}' % VERSION,
        b'{"v":%d,"type":"Goodbye","rank":true}' % VERSION,
        b'{"v":%d,"type":"RankHello","attempt":0,"registration":[]}' % VERSION,
        b'{"v":%d,"type":"NodeHello","attempt":0,"node_rank":0,"host":"a","ranks":["x"]}' % VERSION,
        b'{"v":%d}' % VERSION,
        b'{"v":%d,"type":"RunOver","status":1}' % VERSION,
        encode(JOINS).replace(b'"nodes":3', b'"nodes":"3"'),
        encode(JOINS).replace(b'"train.py"', b"3"),
        b"[" * 100_000,
    ],
)
def test_what_is_no_message_is_an_error(line):
    with pytest.raises(ChannelError):
        decode(line)


def test_another_version_is_an_error_that_says_so():
    with pytest.raises(ChannelError, match=rf"version 3 .* this is version {VERSION}"):
        decode(b'{"v":3,"type":"Welcome"}')


def test_what_a_newer_side_adds_is_passed_over():
    assert decode(json.dumps({"v": VERSION, "type": "Goodbye", "rank": 1, "mood": "good"}).encode()) == Goodbye(1)


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
