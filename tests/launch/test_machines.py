"""Several machines, as several `allstep run` on one: how they come together, run, and end together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from allstep.protocol.authentication import derived_key
from allstep.protocol.connection import connect
from allstep.protocol.messages import JoinRequest, encode
from allstep.protocol.user_secret import user_secret
from allstep.version import __version__
from tests.jobs.launchers import script
from tests.jobs.ports import free_port
from tests.jobs.processes import LIMIT, await_condition
from tests.jobs.running import Running, started

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def node(
    folder: Path,
    rank: int,
    port: int,
    *arguments: str,
    nodes: int = 2,
    host: str = "127.0.0.1",
    env: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """AttemptStart one machine's `allstep run` in a folder of its own, as on a disk that is not shared."""
    place = ["--nnodes", str(nodes), "--node-rank", str(rank), "--rdzv", f"{host}:{port}"]
    own = folder / f"host_{rank}_{os.urandom(3).hex()}"
    own.mkdir()
    with started(own, *place, *arguments, env=env) as running:
        yield running


def end(running: Running) -> tuple[int, str, str]:
    job = running.end()
    return job.code, job.out, job.err


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
        for running in (head, first, second):
            code, out, said = end(running)
            assert (code, out) == (2, "")
            assert "two supervisors are node 1: pid " in said
            assert all(f"pid {each.process.pid} on {socket.gethostname()}" in said for each in (first, second))


MEETS = """
import allstep
with allstep.init(timeout=60) as world:
    print("sum", world.all_reduce(1), "over", world.placement.nodes)
"""


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the machine has no IPv6")
@pytest.mark.nightly
def test_machines_that_know_each_other_by_ipv6_train_together(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, MEETS)), free_port()
    with (
        node(tmp_path, 0, port, target, host="[::1]") as head,
        node(tmp_path, 1, port, target, host="[::1]") as other,
    ):
        for running in (head, other):
            code, out, said = end(running)
            assert code == 0, said
            assert "sum 2 over 2" in out


def test_settings_that_differ_are_named_with_both_values(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('ran')")), free_port()
    with node(tmp_path, 0, port, target, "--lr", "1") as head, node(tmp_path, 1, port, target, "--lr", "2") as other:
        for running in (head, other):
            code, out, said = end(running)
            assert (code, out) == (2, "")
            assert "nodes disagree about the script's arguments: ['--lr', '1'] on node 0" in said


def test_differing_numbers_of_machines_are_named_at_once(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('ran')")), free_port()
    with node(tmp_path, 0, port, target, nodes=3) as head, node(tmp_path, 1, port, target, nodes=2) as other:
        for running in (head, other):
            code, _, said = end(running)
            assert code == 2
            assert "was started with --nnodes 2, node 0 (pid" in said


def test_a_signal_ends_the_wait_for_other_machines(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('ran')")), free_port()
    with node(tmp_path, 0, port, target) as head:
        await_handler(head)
        head.process.send_signal(signal.SIGINT)
        code, _, said = end(head)
    assert (code, said) == (130, "allstep: stopped by SIGINT\n")


def test_a_machine_that_is_stopped_while_it_waits_says_so_to_the_head(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('ran')")), free_port()
    with node(tmp_path, 1, port, target, nodes=3) as other:
        await_handler(other)
        with node(tmp_path, 0, port, target, nodes=3) as head:
            await_connection(port)
            other.process.send_signal(signal.SIGTERM)
            assert end(other)[0] == 143
            code, _, said = end(head)
    assert code == 2
    assert said.endswith("error: node 1 left: stopped by SIGTERM\n")


def await_handler(running: Running) -> None:
    """Wait until the process has begun to watch for signals."""
    bit = 1 << (signal.SIGTERM - 1)

    def watches() -> bool:
        status = Path(f"/proc/{running.process.pid}/status").read_text()
        return bool(int(status.split("SigCgt:")[1].split()[0], 16) & bit)

    await_condition(watches)


def await_connection(port: int) -> None:
    """Wait until somebody listens there and takes a connection that says nothing."""

    def listens() -> bool:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    await_condition(listens)


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
            assert f"node 1 found no node 0 of this run at 127.0.0.1 (port {port}: what answers does not have" in said
            assert "all its machines the same --name and the same secret: the file " in said
            assert "'exp'" not in said
        secret = {"ALLSTEP_SECRET": "another's 0123456789"}
        with node(tmp_path, 1, port, "--name", "exp", target, env=secret) as stranger:
            assert end(stranger)[0] == 2
        with node(tmp_path, 1, port, "--name", "exp", target) as other:
            assert end(other)[0] == 0
            code, _, said = end(head)
    assert code == 0
    assert said.count("turned away a process on 127.0.0.1, which does not have this run's key") == 1


SAY = "print([os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'GROUP_RANK')])\n"
STAY = "import signal\nprint('pid', os.getpid(), flush=True)\nwhile True:\n    signal.pause()\n"


def logs(folder: Path) -> list[str]:
    """The logs of all machines, as MACHINE/ATTEMPT/RANK."""
    found = folder.glob("host_*/runs/*/attempt_*/rank_*.log")
    return sorted(f"{path.parts[-5][:6]}/{path.parts[-2][-1]}/{path.stem[-1]}" for path in found)


def test_ranks_run_through_machines_with_different_numbers_of_workers(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, SAY)), free_port()
    with (
        node(tmp_path, 0, port, "--name", "exp", "--nproc", "1", target) as head,
        node(tmp_path, 1, port, "--name", "exp", "--nproc", "2", target) as other,
    ):
        code, out, said = end(head)
        assert (code, out) == (0, "[0] ['0', '0', '3', '1', '0']\n"), said
        assert "allstep: run exp: 1 worker of 3, node 0 of 2, output kept in runs/exp/attempt_0" in said
        code, out, said = end(other)
        assert (code, sorted(out.splitlines())) == (
            0,
            ["[1] ['1', '0', '3', '2', '1']", "[2] ['2', '1', '3', '2', '1']"],
        )
        assert said.endswith("allstep: run exp ended on all nodes\n")
    assert logs(tmp_path) == ["host_0/0/0", "host_1/0/1", "host_1/0/2"]


def test_a_collective_runs_over_machines(tmp_path: Path) -> None:
    text = (
        "import torch\nimport torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "x = torch.tensor([dist.get_rank() + 1.0])\ndist.all_reduce(x)\nprint(x.item())\ndist.destroy_process_group()\n"
    )
    target, port = str(script(tmp_path, text)), free_port()
    with node(tmp_path, 0, port, target) as head, node(tmp_path, 1, port, "--nproc", "2", target) as other:
        assert end(head)[:2] == (0, "[0] 6.0\n")
        assert sorted(end(other)[1].splitlines()) == ["[1] 6.0", "[2] 6.0"]


def test_a_failure_on_one_machine_ends_the_others_and_is_reported_once(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, f"if rank == 1:\n    raise ValueError('bad batch')\n{STAY}")), free_port()
    with (
        node(tmp_path, 0, port, "--name", "exp", target) as head,
        node(tmp_path, 1, port, "--name", "exp", target) as other,
    ):
        code, _, said = end(head)
        assert code == 1
        assert "allstep: run exp failed: rank 1 of 2 failed first\n  exit code 1\n" in said
        assert "    ValueError: bad batch\n" in said
        code, _, said = end(other)
        assert code == 1
        assert "failed first" not in said
        assert said.endswith(
            "allstep: run exp ended with exit code 1: rank 1: exit code 1 (ValueError: bad batch); "
            "node 0 has the report\n"
        )
    assert len(list(tmp_path.glob("host_0*/runs/exp/attempt_0/failure.json"))) == 1


def test_the_head_begins_attempts_on_all_machines(tmp_path: Path) -> None:
    text = "attempt = os.environ['ALLSTEP_ATTEMPT']\nprint(attempt, os.environ['MASTER_PORT'])\n"
    target = str(script(tmp_path, f"{text}if rank == int(attempt):\n    sys.exit(3)\n"))
    port = free_port()
    arguments = ["--max-restarts", "3", "--nproc", "1", target]
    with node(tmp_path, 0, port, *arguments) as head, node(tmp_path, 1, port, *arguments) as other:
        code, out, said = end(head)
        assert code == 0, said
        assert "attempt 0 failed: rank 0: exit code 3" in said
        assert "attempt 1 failed: rank 1: exit code 3" in said
        assert "succeeded after 2 restarts" in said
        code, there, said = end(other)
        assert code == 0, said
    assert out.replace("[0]", "") == there.replace("[1]", "")  # the same attempts, the same ports
    assert len(set(out.split("\n"))) == 4
    assert len(logs(tmp_path)) == 6


@pytest.mark.parametrize(
    "killed", [pytest.param(0, id="the head"), pytest.param(1, id="the other", marks=pytest.mark.nightly)]
)
def test_losing_a_machine_ends_the_other_within_the_limit(killed: int, tmp_path: Path) -> None:
    target, port = str(script(tmp_path, STAY)), free_port()
    limits = {"ALLSTEP_LIMITS": "link=3"}
    with node(tmp_path, 0, port, target, env=limits) as head, node(tmp_path, 1, port, target, env=limits) as other:
        machines = (head, other)
        for running in machines:
            running.await_out(1)
        machines[killed].process.kill()
        code, _, said = end(machines[1 - killed])
    assert code == 84, said
    assert "node" in said.splitlines()[-1] or "lost" in said


def test_a_signal_to_one_machine_ends_the_run_on_all(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, STAY)), free_port()
    with node(tmp_path, 0, port, target) as head, node(tmp_path, 1, port, target) as other:
        for running in (head, other):
            running.await_out(1)
        head.process.send_signal(signal.SIGTERM)
        assert end(head)[0] == 143
        assert end(other)[0] == 143


def test_a_machine_that_was_stopped_is_not_waited_for_before_a_restart(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, STAY)), free_port()
    arguments = ["--max-restarts", "5", target]
    with node(tmp_path, 0, port, *arguments) as head, node(tmp_path, 1, port, *arguments) as other:
        for running in (head, other):
            running.await_out(1)
        other.process.send_signal(signal.SIGTERM)
        assert end(other)[0] == 143
        code, _, said = end(head)
    assert code == 143
    assert "attempt 0 failed: rank 1: killed by SIGTERM" in said
    assert said.endswith("allstep: no further attempt: node 1 left: stopped by SIGTERM\n")


def test_a_machine_that_joins_and_then_is_never_heard_of_is_lost(tmp_path: Path) -> None:
    target, port = script(tmp_path, STAY), free_port()
    facts = {
        "the version of allstep": __version__,
        "the script": str(target),
        "the script's arguments": "[]",
        "name": "exp",
        "max_restarts": "0",
        "stop_after": "3",
        "limits": "link=1",
        "fault": "None",
    }
    with node(tmp_path, 0, port, "--name", "exp", "--limits", "link=1", str(target)) as head:
        await_connection(port)
        key = derived_key(user_secret(os.environ), "join", "exp")
        with contextlib.closing(connect([("127.0.0.1", port)], key=key, within=LIMIT, answer=LIMIT)) as silent:
            silent.send(encode(JoinRequest(2, 1, 1, "elsewhere", 1, facts)))
            code, _, said = end(head)
    assert code == 84, said
    assert "node 1, which did not connect" in said
