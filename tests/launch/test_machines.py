"""Several machines, as several `allstep run` on one: how they come together, run, and end together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.launch.command import ALLSTEP, LIMIT, environment, script

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def node(
    folder: Path, rank: int, port: int, *arguments: str, nodes: int = 2, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start one machine's `allstep run` in a folder of its own, as on a disk that is not shared."""
    place = ["--nnodes", str(nodes), "--node-rank", str(rank), "--rdzv", f"127.0.0.1:{port}"]
    own = folder / f"host_{rank}_{os.urandom(3).hex()}"
    own.mkdir()
    process = subprocess.Popen(
        [*ALLSTEP, "run", *place, *arguments],
        cwd=own,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, said = process.communicate(timeout=LIMIT)
    return process.returncode, out, said


def test_a_machine_that_does_not_come_is_named_on_all_others(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('ran')")), free_port()
    with (
        node(tmp_path, 0, port, "--rdzv-timeout", "3", target, nodes=4) as head,
        node(tmp_path, 2, port, target, nodes=4) as other,
    ):
        code, out, said = end(head)
        assert (code, out) == (2, "")
        assert "error: nodes 1, 3 of 4 did not come within 3 s; check that allstep run was started there" in said
        code, out, said = end(other)
        assert (code, out) == (2, "")
        assert f"error: node 0 at 127.0.0.1, port {port}, refused: nodes 1, 3 of 4 did not come" in said


def test_a_machine_that_finds_no_head_says_where_it_looked(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('ran')")), free_port()
    with node(tmp_path, 1, port, "--rdzv-timeout", "1", target) as other:
        code, _, said = end(other)
    assert code == 2
    assert f"node 1 did not reach node 0 at 127.0.0.1 within 1 s (port {port}: Connection refused)" in said


def test_two_machines_of_one_rank_are_named_with_pid_and_host(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('ran')")), free_port()
    with (
        node(tmp_path, 0, port, target, nodes=3) as head,
        node(tmp_path, 1, port, target, nodes=3) as first,
        node(tmp_path, 1, port, target, nodes=3) as second,
    ):
        for process in (head, first, second):
            code, out, said = end(process)
            assert (code, out) == (2, "")
            assert "two supervisors are node 1: pid " in said
            assert all(f"pid {each.pid} on {socket.gethostname()}" in said for each in (first, second))


def test_settings_that_differ_are_named_with_both_values(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('ran')")), free_port()
    with node(tmp_path, 0, port, target, "--lr", "1") as head, node(tmp_path, 1, port, target, "--lr", "2") as other:
        for process in (head, other):
            code, out, said = end(process)
            assert (code, out) == (2, "")
            assert "nodes disagree about the script's arguments: ['--lr', '1'] on node 0" in said


def test_differing_numbers_of_machines_are_named_at_once(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('ran')")), free_port()
    with node(tmp_path, 0, port, target, nodes=3) as head, node(tmp_path, 1, port, target, nodes=2) as other:
        for process in (head, other):
            code, _, said = end(process)
            assert code == 2
            assert "was started with --nnodes 2, node 0 (pid" in said


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    target = str(script(tmp_path, "print('ran')"))
    with socket.create_server(("", 0)) as holder:
        port = holder.getsockname()[1]
        with node(tmp_path, 0, port, target) as head:
            code, _, said = end(head)
    assert code == 2
    assert f"node 0 cannot listen for the other nodes on port {port} (Address already in use)" in said


def test_a_signal_ends_the_wait_for_other_machines(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('ran')")), free_port()
    with node(tmp_path, 0, port, target, nodes=3) as head, node(tmp_path, 1, port, target, nodes=3) as other:
        await_connection(port)
        other.send_signal(signal.SIGTERM)
        assert end(other)[0] == 143
        head.send_signal(signal.SIGINT)
        code, _, said = end(head)
    assert code == 130
    assert "stopped by SIGINT" in said


def await_connection(port: int) -> None:
    """Wait until somebody listens there and takes a connection that says nothing."""
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return


def test_strangers_on_the_port_are_turned_away_and_the_run_goes_on(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('ran')")), free_port()
    with node(tmp_path, 0, port, "--name", "exp", target) as head:
        await_connection(port)
        with socket.create_connection(("127.0.0.1", port)) as browser:
            browser.sendall(b"GET / HTTP/1.1\r\n\r\n")
            browser.settimeout(LIMIT)
            assert browser.recv(10) == b""  # closed without a word
        with node(tmp_path, 1, port, "--name", "other", target) as stranger:
            code, _, said = end(stranger)
            assert code == 2
            assert f"the port is that of run 'exp' (pid {head.pid} on" in said
        with node(tmp_path, 1, port, "--name", "exp", target, env={"ALLSTEP_SECRET": "x"}) as stranger:
            assert end(stranger)[0] == 2
        with node(tmp_path, 1, port, "--name", "exp", target) as other:
            assert (end(other)[0], end(head)[0]) == (0, 0)
