"""Rows 18, 20, 21 and 25 to 30 of the fault matrix: what is wrong before training is found before training."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import psutil
import pytest

from allstep.launch.environment import ReservedPort, worker_environment
from allstep.testing import FaultPlan
from tests.faults.rehearsal import BOUND, NEVER, STRIKES, by_hand, check_first_lines, rehearsal, rehearse
from tests.jobs.job import Job
from tests.jobs.launchers import Launcher, also_under_torchrun_by_night, place
from tests.jobs.running import run

pytestmark = pytest.mark.slow

AT_ONCE = 10.0
"""Seconds for ranks that have started to come and to end, far below the 300 that they give each other."""


@also_under_torchrun_by_night
def test_row_18_the_death_of_the_stores_host_is_a_clear_error_in_bounded_time(
    tmp_path: Path, launcher: Launcher
) -> None:
    job = rehearse(tmp_path, "train.py", fault=FaultPlan.at(0, 7).kill(9), launcher=launcher, within=BOUND)
    assert job.code != 0
    check_first_lines(job, "rank 0 of 2 failed first", "killed")


@pytest.mark.nightly
def test_row_20_a_port_in_use_is_an_error_that_names_it(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        first, second = by_hand(tmp_path, "meets.py", *(place(rank, 2, port, PATIENCE="3") for rank in range(2)))
    assert (first.code, second.code) == (1, 1)
    assert f"port {port} in use" in first.text
    assert f"port {port}" in second.text


def test_row_20_under_allstep_run_a_port_is_neither_in_use_nor_lost(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TAKE": "1"}
        job = rehearse(tmp_path, "meets.py", env=env)
    assert job.code == 0, job.text
    assert job.text.count("met ") == 2
    assert f"at {port} " not in job.text
    assert "cannot take the port: Address already in use" in job.text  # a rank tried to, before they met


def test_row_20_a_port_in_use_on_several_machines_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("open('ran', 'w')")
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        job = run(tmp_path, "--nnodes", "2", "--node-rank", "0", "--rdzv", f"127.0.0.1:{port}", "script.py")
    assert job.code == 2
    assert f"node 0 cannot listen for the other nodes on port {port} (Address already in use)" in job.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["script.py"]


@pytest.mark.parametrize("launcher", ["allstep", pytest.param("torchrun", marks=pytest.mark.nightly)])
def test_row_21_a_second_run_on_the_same_ports_is_turned_away(tmp_path: Path, launcher: Launcher) -> None:
    with rehearsal(tmp_path, "meets.py", launcher=launcher, env={"STAY": "1"}) as first:
        port, channel = first.await_line("met ", 2)[0].split()[-2:]
        if launcher == "torchrun":
            channel = sidecars_address(first.pids())
        at_the_store = [place(rank, 2, int(port), PATIENCE="3") for rank in range(2)]
        at_the_channel = worker_environment(
            rank=1,
            world_size=2,
            local_rank=1,
            local_world_size=2,
            master_addr="127.0.0.1",
            master_port=int(port),
            run_id="second",
            attempt=0,
            max_restarts=0,
            channel=channel,
            key="of the second run",
        )
        server, client, stranger = by_hand(tmp_path, "meets.py", *at_the_store, at_the_channel)
        with socket.create_connection(("127.0.0.1", int(channel.split(":")[1]))) as garbage:
            garbage.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
            (tmp_path / "go").touch()
            job = first.end()
    assert [each.code for each in (server, client, stranger)] == [1, 1, 1]
    assert f"port {port} in use" in server.err
    # On a busy machine the store of the first may take longer to answer than the second is patient.
    assert re.search(rf"port {port}: (another job's store|something answers that is not a torch store)", client.err)
    assert "what answers does not have this run's key" in stranger.err
    assert job.code == 0, job.text
    assert "failed" not in job.text


def sidecars_address(pids: list[int]) -> str:
    """Where the sidecar among these processes listens."""
    (sidecar,) = (each for each in map(psutil.Process, pids) if "sidecar_process" in " ".join(each.cmdline()))
    (port,) = (each.laddr.port for each in sidecar.net_connections() if each.status == psutil.CONN_LISTEN)
    return f"127.0.0.1:{port}"


def seconds_together(jobs: list[Job]) -> float:
    """Seconds from the arrival of the last to the end of all."""
    arrived = max(line.at for job in jobs for line in job.said if "arriving" in line.text)
    return max(job.ended for job in jobs) - arrived


def test_row_25_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    with ReservedPort(shared=True) as reserved:
        jobs = by_hand(tmp_path, "meets.py", *(place(rank, 3, reserved.port, PATIENCE="5") for rank in range(2)))
    assert seconds_together(jobs) < NEVER
    for job in jobs:
        assert job.code == 1
        assert "1 of 3 ranks did not arrive within 5 s: 2;" in job.err


@pytest.mark.nightly
def test_row_25_a_rank_that_ends_before_it_comes_is_not_waited_for(tmp_path: Path) -> None:
    job = rehearse(tmp_path, "meets.py", fault=FaultPlan.at(1, when="start").exit(0), within=AT_ONCE)
    assert job.code == 1
    check_first_lines(job, "rank 1 of 2 left first", "did not call init")


def test_row_26_two_processes_with_one_rank_are_both_named(tmp_path: Path) -> None:
    with ReservedPort(shared=True) as reserved:
        places = [place(rank, 3, reserved.port, PATIENCE="10") for rank in (0, 1, 1)]
        jobs = by_hand(tmp_path, "meets.py", *places)
    assert {job.code for job in jobs} == {1}
    host = socket.gethostname()
    one, other = (f"process {job.pid} on {host}" for job in jobs[1:])
    named = (f"two processes are rank 1: {one} and {other}; ", f"two processes are rank 1: {other} and {one}; ")
    assert any(words in job.err for job in jobs for words in named), [job.err for job in jobs]


def test_row_27_world_sizes_that_differ_are_found_at_once(tmp_path: Path) -> None:
    with ReservedPort(shared=True) as reserved:
        places = [place(0, 2, reserved.port), place(1, 3, reserved.port)]
        jobs = by_hand(tmp_path, "meets.py", *places)
    assert seconds_together(jobs) < NEVER
    assert {job.code for job in jobs} == {1}
    said = ("takes the world to have 3 ranks, and 2 were started", "disagree about world_size: 2 in process")
    assert any(words in job.text for job in jobs for words in said), jobs


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", ""),
        pytest.param("MASTER_PORT", "99999", marks=pytest.mark.nightly),
        pytest.param("WORLD_SIZE", "two", marks=pytest.mark.nightly),
    ],
)
def test_row_28_garbage_in_the_environment_is_one_error_before_connecting(
    tmp_path: Path, name: str, value: str
) -> None:
    (job,) = by_hand(tmp_path, "meets.py", place(0, 2, 29400) | {name: value})
    assert job.code == 1
    assert job.since("arriving") < NEVER
    last = job.err.splitlines()[-1]
    assert name in last
    assert repr(value) in last


@also_under_torchrun_by_night
def test_row_29_a_setting_that_differs_by_rank_is_named_with_each_value(tmp_path: Path, launcher: Launcher) -> None:
    job = rehearse(tmp_path, "meets.py", launcher=launcher, env={"LR_OF_1": "0.2"}, within=AT_ONCE, since="arriving")
    assert job.code == 1
    assert "ranks disagree about optimizer.lr (rank 0: '0.1'; rank 1: '0.2')" in job.text
    assert "optimizer.name" not in job.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nproc: 2\nname: [job\n", "broken.yaml:3: "),
        ("nproc: 2\ngrace: soon\n", "broken.yaml:2: grace"),
        ("nproc: 2\nlimits: step=soon\n", "broken.yaml:2: limits"),
        ("nproc: 2\nfault: rank=1,oops\n", "broken.yaml:2: fault"),
    ],
    ids=["truncated", "type", "limits", "fault"],
)
def test_row_30_a_corrupt_configuration_is_named_by_file_line_and_field(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    (tmp_path / "script.py").write_text("open('ran', 'w')")
    job = run(tmp_path, "--config", "broken.yaml", "script.py")
    assert job.code == 2
    assert says in job.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.yaml", "script.py"]


@pytest.mark.nightly
def test_row_18_ranks_that_torchruns_agent_left_behind_come_to_their_end(tmp_path: Path) -> None:
    fault = FaultPlan.at(iteration=5).sleep(2)
    with rehearsal(tmp_path, "reduces.py", "20", fault=fault, launcher="torchrun") as running:
        running.await_line(STRIKES, 2)
        running.process.kill()  # it serves the store
        running.await_line("trained 20", 2)
        running.end()
