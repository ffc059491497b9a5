"""B1: nothing that anybody sends raises through a loop, at any port, before or after it has proved itself."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allstep.errors import ChannelError
from allstep.protocol.authentication import ConnectingHandshake, ListeningHandshake
from allstep.protocol.connection import Connection
from allstep.protocol.messages import VERSION, Notice, RankHello, decode, encode
from tests.jobs.launchers import environment
from tests.monitor.driving import Caller, registration, serving, world
from tests.protocol.proving import HOST, KEY
from tests.protocol.test_messages import EXAMPLES
from tests.security.fuzzing import PORTS, opened, random_line

SURROGATE = b'{"v":%d,"type":"RankHello","nonce":"\\ud800","attempt":0,"registration":{}}\n' % VERSION
BATCH = 100


def test_row_b1_a_line_with_half_a_character_ends_nobody() -> None:
    with serving() as hub, world(hub) as ranks:
        with socket.create_connection((HOST, hub.port)) as stranger:
            stranger.sendall(SURROGATE)
            connection = Connection(stranger)
            hub.until(lambda: list(connection.receive()) or connection.ended)
        ranks[0].beat(iteration=9)
        hub.until(lambda: hub.service.progress() == (1, 9))


def test_half_characters_from_a_rank_are_spelled_out_and_it_stays() -> None:
    """A script may raise an error with such a text, or have a file of such a name."""
    with serving() as hub, world(hub) as ranks:
        ranks[0].fail(message="no file \udcff")
        assert "no file \\udcff" in hub.verdict().cause.what


def test_a_message_that_cannot_be_handled_costs_its_sender_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(3) as hub, world(hub, 3) as ranks:
        monkeypatch.setattr(type(hub.service), "_from_rank", lambda *_: 1 / 0)
        ranks[1].beat()
        assert ranks[1].hears_no_more() == "closed by the other side"
        monkeypatch.undo()
        ranks[0].beat(iteration=4)
        hub.until(lambda: hub.service.progress() == (1, 4))


@pytest.mark.parametrize("name", PORTS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_row_b1_messages_at_random_end_no_service(name: str, seed: int) -> None:
    draw = random.Random(seed)
    with opened(name) as port:
        for _ in range(20):
            port.send(b"".join(random_line(draw, port.rank) for _ in range(draw.randrange(1, 8))))
        assert port.served()


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_no_bytes_do_anything_to_a_handshake_but_raise_the_one_error(first: bytes, second: bytes) -> None:
    listens, connects = ListeningHandshake(KEY, 1), ConnectingHandshake(KEY, 1)
    for line in (first, second):
        for take in (listens.receive, connects.prove):
            with pytest.raises(ChannelError):
                take(line)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(_json, _json)
def test_any_json_is_a_message_that_can_be_sent_on_or_an_error(rank: object, why: object) -> None:
    line = json.dumps({"v": VERSION, "type": "RankLost", "rank": rank, "why": why}).encode()
    try:
        message = decode(line)
    except ChannelError:
        return
    assert decode(encode(message)) == message
    str(message).encode()


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", str(1 << 63), "9" * 5000])
def test_numbers_that_nothing_can_be_done_with_are_refused(number: str) -> None:
    line = f'{{"v":{VERSION},"type":"RankHello","attempt":0,"registration":{{}},"patience":{number}}}'
    with pytest.raises(ChannelError):
        decode(line.encode())


def test_a_relay_may_speak_for_its_own_ranks_only() -> None:
    with serving(3) as hub:
        from allstep.protocol.messages import NodeHello

        node = Caller(hub, 1, 3).come(NodeHello(0, 1, "h1", (1,)))
        hub.until(lambda: hub.service.connected == 1)
        node.say(RankHello(0, registration(2, 3)))
        node.say(RankHello(0, registration(1, 3)))
        hub.until(lambda: hub.service.deadline() and hub.service.connected == 1)
        hub.pass_time(0.1)
        assert set(hub.service.registrations()) <= {1}
        node.close()


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", PORTS)
def test_a_million_messages_end_no_service(name: str) -> None:
    draw = random.Random(13)
    sent, wanted = 0, 1_000_000 // len(PORTS) + 1
    while sent < wanted:
        with opened(name) as port:  # a service that has come to a verdict does little, so there is a new one
            for _ in range(20):
                port.send(b"".join(random_line(draw, port.rank, garbage=0.001) for _ in range(BATCH)))
                sent += BATCH
                if port.closed:
                    break
            assert port.served()


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_million_lines_are_messages_or_the_one_error() -> None:
    draw = random.Random(14)
    for _ in range(1_000_000):
        line = random_line(draw)[:-1]
        try:
            message = decode(line)
        except ChannelError:
            continue
        if not isinstance(message, Notice):
            encode(message)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_what_coverage_leads_to_is_a_message_or_the_one_error(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="pip install atheris, which has wheels for Linux only")
    for number, example in enumerate(EXAMPLES):
        (tmp_path / str(number)).write_bytes(encode(example))
    program = Path(__file__).with_name("coverage_guided.py")
    done = subprocess.run(
        [sys.executable, program, "200000", tmp_path], env=environment(), capture_output=True, text=True, timeout=3500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done 200000 runs" in done.stderr
