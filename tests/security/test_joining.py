"""B2: who joins a run of several machines, and what a stranger and a false head are told: nothing."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from allstep.errors import ChannelError, ConfigurationError
from allstep.launch.join_protocol import objection_to_start
from allstep.protocol.authentication import ConnectingHandshake, ListeningHandshake, derived_key
from allstep.protocol.foreign_text import printable
from allstep.protocol.messages import VERSION, AttemptStart, Message, Refused, encode
from allstep.protocol.user_secret import secret_file, user_secret
from tests.jobs.launchers import script
from tests.jobs.ports import free_port
from tests.jobs.processes import LIMIT
from tests.jobs.running import run
from tests.launch.test_machines import await_connection, end, node
from tests.protocol.proving import HOST, KEY, answer, read_line

SECRET = "known to all machines of the run"
START = AttemptStart("exp", 0, "salt", 2000, 2001, 1, 2, 0)


def shaken(listens: str, connects: str, port: int = 5, other: int = 5) -> None:
    server, client = ListeningHandshake(listens, port), ConnectingHandshake(connects, other)
    assert server.receive(client.prove(server.receive(client.first))) == b""


def test_both_sides_with_the_key_prove_it_to_each_other() -> None:
    shaken(KEY, KEY)


@pytest.mark.parametrize("keys", [(KEY, "other"), ("", KEY), (KEY, KEY + " ")])
def test_without_the_key_neither_side_is_believed(keys: tuple[str, str]) -> None:
    with pytest.raises(ChannelError, match="does not have this run's key"):
        shaken(*keys)


def test_a_proof_that_was_fetched_at_another_port_is_of_no_use() -> None:
    with pytest.raises(ChannelError, match="does not have this run's key"):
        shaken(KEY, KEY, port=5, other=6)


def test_an_old_proof_is_of_no_use() -> None:
    client, server = ConnectingHandshake(KEY, 5), ListeningHandshake(KEY, 5)
    proof = client.prove(server.receive(client.first))
    again = ListeningHandshake(KEY, 5)
    again.receive(client.first)
    with pytest.raises(ChannelError, match="does not have this run's key"):
        again.receive(proof)


def test_the_answer_of_a_service_is_no_proof_for_who_connects() -> None:
    service, victim = ListeningHandshake(KEY, 5), ListeningHandshake(KEY, 5)
    asked = json.loads(victim.receive(ConnectingHandshake(KEY, 5).first))
    line = json.dumps({"v": asked["v"], "type": "Challenge", "challenge": asked["challenge"]}).encode()
    reflected = json.loads(service.receive(line))
    with pytest.raises(ChannelError):
        victim.receive(json.dumps({"v": asked["v"], "type": "Proof", "proof": reflected["proof"]}).encode())


@contextlib.contextmanager
def head(serve: Callable[[socket.socket], None]) -> Iterator[tuple[int, list[BaseException]]]:
    """A false head: what it does with the first connection."""
    problems: list[BaseException] = []

    def accept() -> None:
        try:
            with listener.accept()[0] as sock:
                sock.settimeout(LIMIT)
                serve(sock)
        except BaseException as error:
            problems.append(error)

    port = free_port()
    with socket.create_server((HOST, port)) as listener:
        listener.settimeout(LIMIT)
        thread = threading.Thread(target=accept)
        thread.start()
        yield port, problems
        thread.join(LIMIT)


@pytest.mark.slow
def test_row_b2_a_false_head_is_shown_a_random_text_and_nothing_else(tmp_path: Path) -> None:
    heard: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        heard.append(read_line(sock))
        sock.sendall(ListeningHandshake("not the key", sock.getsockname()[1]).receive(heard[0]))
        while more := sock.recv(4096):
            heard.append(more)

    target = str(script(tmp_path, "print('ran')"))
    env = {"ALLSTEP_SECRET": SECRET}
    with (
        head(serve) as (port, problems),
        node(tmp_path, 1, port, "--name", "exp", target, "--api-token=abc", env=env) as it,
    ):
        code, out, said = end(it)
    assert not problems
    assert (code, out) == (2, "")
    assert "found no node 0 of this run" in said
    (line,) = heard
    assert set(json.loads(line)) == {"v", "type", "challenge"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("message", "words"),
    [
        (Refused("go \x1b]0;mine\x07\x1b[2Jaway"), "refused: go \\x1b]0;mine\\x07\\x1b[2Jaway"),
        (AttemptStart("../../../planted", 0, "s", 1, 2, 1, 2, 0), "is not to be trusted: run_id is '../../../planted'"),
    ],
)
def test_what_a_head_says_is_checked_cut_and_spelled_out(message: Message, words: str, tmp_path: Path) -> None:
    """Even one that has the key: another machine of the run may have been taken over."""

    def serve(sock: socket.socket) -> None:
        answer(sock, derived_key(SECRET, "join", "exp"))
        read_line(sock)
        sock.sendall(encode(message))
        sock.recv(1)

    target = str(script(tmp_path, "print('ran')"))
    env = {"ALLSTEP_SECRET": SECRET}
    with head(serve) as (port, problems), node(tmp_path, 1, port, "--name", "exp", target, env=env) as it:
        code, out, said = end(it)
    assert not problems
    assert (code, out) == (2, "")
    assert words in said
    assert "\x1b" not in said
    assert not list(tmp_path.parent.rglob("planted"))
    assert not list(tmp_path.rglob("attempt_*"))


@pytest.mark.slow
def test_row_b2_a_stranger_is_told_nothing_and_given_no_place(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('ran')")), free_port()
    arguments = ["--name", "exp", target, "--api-token=abcdefgh"]
    with node(tmp_path, 0, port, *arguments) as first:
        await_connection(port)
        with socket.create_connection((HOST, port)) as stranger:
            stranger.settimeout(LIMIT)
            stranger.sendall(ConnectingHandshake("guessed", port).first)
            told = stranger.recv(4096)
            stranger.sendall(f'{{"v":{VERSION},"type":"Proof","proof":"00"}}\n'.encode())
            while more := stranger.recv(4096):
                told += more
        assert set(json.loads(told)) == {"v", "type", "challenge", "proof"}
        with node(tmp_path, 1, port, *arguments) as other:
            assert end(other)[0] == 0
            assert end(first)[0] == 0


@pytest.mark.slow
def test_arguments_that_differ_are_named_without_their_secrets(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('ran')")), free_port()
    with (
        node(tmp_path, 0, port, target, "--api-token=abcdefgh", "--password", "wordpass") as first,
        node(tmp_path, 1, port, target, "--api-token=ijklmnop", "--password", "wordpass") as other,
    ):
        for running in (first, other):
            code, _, said = end(running)
            assert code == 2
            assert "nodes disagree about the script's arguments: ['--api-token=***', '--password', '***']" in said
            assert not any(each in said for each in ("abcdefgh", "ijklmnop", "wordpass"))


@pytest.mark.slow
def test_workers_do_not_have_the_secret(tmp_path: Path) -> None:
    target = script(tmp_path, "print(sorted(name for name in os.environ if 'SECRET' in name))")
    job = run(tmp_path, target, env={"ALLSTEP_SECRET": SECRET})
    assert (job.code, job.out) == (0, "[]\n")


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": ".."},
        {"run_id": "a/b"},
        {"run_id": "/etc"},
        {"run_id": "\x1b[2J"},
        {"run_id": ""},
        {"run_id": "a" * 300},
        {"attempt": -1},
        {"channel_port": 0},
        {"master_port": 65536},
        {"first_rank": -1},
        {"first_rank": 2},
        {"world_size": 1},
        {"max_restarts": -1},
    ],
)
def test_a_start_that_cannot_be_meant_is_refused(changes: dict[str, object]) -> None:
    from dataclasses import replace

    assert objection_to_start(START, 1) == ""
    objection = objection_to_start(replace(START, **changes), 1)  # type: ignore[arg-type]
    assert objection
    assert objection.isprintable()


@pytest.mark.parametrize("text", ["\x1b[31mred", "bell\x07", "‮backwards", "null\0", "\x9b31m", "\r"])
def test_text_of_others_is_spelled_out(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(f"a\n\t{text}", lines=True).replace("\n\t", "").isprintable()


# The secret of a user.


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path)}


def test_a_secret_is_drawn_once_and_is_its_users_alone(home: dict[str, str]) -> None:
    first = user_secret(home)
    assert len(first) == 64
    assert user_secret(home) == first
    path = secret_file(home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [each.name for each in path.parent.iterdir()] == ["secret"]


def test_processes_that_look_at_once_find_the_same_secret(home: dict[str, str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(lambda _: user_secret(home), range(64)))) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_can_read_or_write_is_no_secret(home: dict[str, str], mode: int) -> None:
    user_secret(home)
    secret_file(home).chmod(mode)
    with pytest.raises(ConfigurationError, match="is not this user's alone"):
        user_secret(home)


def test_a_link_is_not_followed_to_a_secret(home: dict[str, str], tmp_path: Path) -> None:
    path = secret_file(home)
    path.parent.mkdir(parents=True)
    planted = tmp_path / "planted"
    planted.write_text("0123456789abcdef")
    planted.chmod(0o600)
    path.symlink_to(planted)
    with pytest.raises(OSError, match="symbolic"):
        user_secret(home)


@pytest.mark.parametrize("text", ["", "short", "  15 characters "])
def test_a_secret_that_could_be_guessed_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="it must have 16 or more"):
        user_secret({"ALLSTEP_SECRET": text})


def test_a_variable_wins_over_the_file(home: dict[str, str]) -> None:
    assert user_secret({**home, "ALLSTEP_SECRET": SECRET}) == SECRET
    assert not secret_file(home).exists()


def test_where_nothing_can_be_kept_a_run_of_machines_says_what_to_set(tmp_path: Path) -> None:
    target = str(script(tmp_path, "print('ran')"))
    (tmp_path / "file").write_text("")
    env = {"XDG_CONFIG_HOME": str(tmp_path / "file" / "folder")}
    with node(tmp_path, 0, free_port(), target, env=env) as first:
        code, _, said = end(first)
    assert code == 2
    assert "have no secret by which to know each other" in said
    assert "set ALLSTEP_SECRET to the same on all of them" in said


def test_this_process_has_a_secret_of_the_tests_only() -> None:
    assert "pytest" in str(secret_file(os.environ))
