"""Rows 18, 20, 21 and 25 to 30 of the fault matrix: what is wrong before training is found before training."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from allstep.channel.arrival import Arrival
from allstep.channel.client import Client
from allstep.channel.messages import Hello
from allstep.errors import WorldError
from allstep.launch.port import ReservedPort
from allstep.testing import FaultPlan
from tests.faults.jobs import STRIKES, Launcher, by_hand, place, rehearse, start, started
from tests.faults.reading import check_first_lines

pytestmark = pytest.mark.slow

AT_ONCE = 20.0
"""Seconds for processes to start and to end, far below the time that ranks give each other."""


@pytest.mark.parametrize("launcher", ["allstep", "torchrun"])
def test_row_18_the_death_of_the_stores_host_is_a_clear_error_in_bounded_time(
    tmp_path: Path, launcher: Launcher
) -> None:
    job = rehearse(tmp_path, "train.py", fault=FaultPlan.at(0, 7).kill(9), launcher=launcher)
    assert job.since(STRIKES) < job.bound()
    assert job.code != 0
    check_first_lines(job, "rank 0 of 2 failed first", "killed")


def test_row_20_a_port_in_use_is_an_error_that_names_it(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        first, second = by_hand(tmp_path, "meets.py", *(place(rank, 2, port, PATIENCE="3") for rank in range(2)))
    assert (first.code, second.code) == (1, 1)
    assert f"port {port} in use" in first.text
    assert f"port {port}" in second.text


def test_row_21_a_stranger_on_the_channels_port_is_turned_away_and_the_run_goes_on(tmp_path: Path) -> None:
    with started(tmp_path, "meets.py", env={"STAY": "1"}) as running:
        channel = running.await_line("met")[0].split()[-1]
        arrival = Arrival(
            rank=1, world_size=2, host="elsewhere", pid=1, device_type="cpu", backend="gloo", accelerator=None
        )
        with pytest.raises(WorldError, match=r"(?i)another run|nonce|closed the connection"):
            Client.connect(channel, Hello("of another run", 0, arrival), timeout=5.0)
        with socket.create_connection((channel.split(":")[0], int(channel.split(":")[1]))) as garbage:
            garbage.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
            (tmp_path / "go").touch()
            job = running.end()
    assert job.code == 0, job.text


def test_row_25_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    with ReservedPort() as reserved:
        jobs = by_hand(tmp_path, "meets.py", *(place(rank, 3, reserved.port, PATIENCE="5") for rank in range(2)))
    for job in jobs:
        assert job.code == 1
        assert "1 of 3 ranks did not arrive" in job.text
        assert ": 2;" in job.text or "rank 2" in job.text


def test_row_25_a_rank_that_ends_before_it_comes_is_not_waited_for(tmp_path: Path) -> None:
    job = rehearse(tmp_path, "meets.py", fault=FaultPlan.at(1, when="start").exit(0))
    assert job.since(STRIKES) < job.bound(AT_ONCE)
    assert job.code == 1
    check_first_lines(job, "rank 1 of 2 left first", "did not call init")


def test_row_26_two_processes_with_one_rank_are_both_named(tmp_path: Path) -> None:
    with ReservedPort() as reserved:
        places = [place(rank, 3, reserved.port, PATIENCE="10") for rank in (0, 1, 1)]
        jobs = by_hand(tmp_path, "meets.py", *places)
    assert {job.code for job in jobs} == {1}
    said = "\n".join(job.text for job in jobs)
    assert "rank 1" in said
    for job in jobs[1:]:
        assert f"process {job.pid}" in said or f"{job.pid} on {socket.gethostname()}" in said, said


def test_row_27_world_sizes_that_differ_are_found_at_once(tmp_path: Path) -> None:
    with ReservedPort() as reserved:
        places = [place(0, 2, reserved.port), place(1, 3, reserved.port)]
        jobs = by_hand(tmp_path, "meets.py", *places)
    for job in jobs:
        assert job.code == 1
        assert job.ended - job.began < job.bound(AT_ONCE)
    said = ("takes the world to have 3 ranks, and 2 were started", "disagree about world_size: 2 in process")
    assert any(words in job.text for job in jobs for words in said), jobs


@pytest.mark.parametrize(("name", "value"), [("RANK", ""), ("MASTER_PORT", "99999"), ("WORLD_SIZE", "two")])
def test_row_28_garbage_in_the_environment_is_one_clear_error_before_connecting(
    tmp_path: Path, name: str, value: str
) -> None:
    (job,) = by_hand(tmp_path, "meets.py", place(0, 2, 29400) | {name: value})
    assert job.code == 1
    assert job.ended - job.began < job.bound(AT_ONCE)
    last = job.text.splitlines()[-1]
    assert name in last
    assert repr(value) in last


@pytest.mark.parametrize("launcher", ["allstep", "torchrun"])
def test_row_29_a_setting_that_differs_by_rank_is_named_with_each_value(tmp_path: Path, launcher: Launcher) -> None:
    job = rehearse(tmp_path, "meets.py", launcher=launcher, env={"LR_OF_1": "0.2"})
    assert job.ended - job.began < job.bound(AT_ONCE)
    assert job.code == 1
    assert "optimizer.lr" in job.text
    assert "0.1" in job.text
    assert "0.2" in job.text
    assert "optimizer.name" not in job.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nproc: 2\nname: [job\n", ["broken.yaml:3: "]),
        ("nproc: 2\ngrace: soon\n", ["broken.yaml:2: grace"]),
        ("nproc: 2\nlimits: step=soon\n", ["broken.yaml:2: limits"]),
        ("nproc: 2\nfault: rank=1,oops\n", ["broken.yaml:2: fault"]),
    ],
    ids=["truncated", "type", "limits", "fault"],
)
def test_row_30_a_corrupt_configuration_starts_nothing_and_names_file_line_and_field(
    tmp_path: Path, text: str, says: list[str]
) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    (tmp_path / "script.py").write_text("open('ran', 'w')")
    with start(tmp_path, [sys.executable, "-m", "allstep", "run", "--config", "broken.yaml", "script.py"]) as running:
        job = running.end()
    assert job.code == 2
    for word in says:
        assert word in job.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.yaml", "script.py"]


def test_row_18_ranks_that_torchruns_agent_left_behind_come_to_their_end(tmp_path: Path) -> None:
    with started(
        tmp_path, "few_steps.py", "20", fault=FaultPlan.at(iteration=5).sleep(2), launcher="torchrun"
    ) as running:
        running.await_line(STRIKES, 2)
        running.process.kill()  # it serves the store
        running.await_line("trained 20", 2)
        job = running.end()
    assert job.left == []
