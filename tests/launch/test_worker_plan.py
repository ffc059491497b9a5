"""What workers are started with, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from allstep.errors import ConfigurationError
from allstep.launch.devices import Devices
from allstep.launch.settings import LaunchSettings
from allstep.launch.worker_plan import Command, Share, WorkerPlan, plan_workers, worker_count


def plan(
    environ: dict[str, str], *, cores: int = 8, devices: Devices | None = None, **settings: Any
) -> tuple[WorkerPlan, ...]:
    asked = LaunchSettings(**settings)
    return plan_workers(
        asked,
        Command("train.py"),
        share(workers=worker_count(asked, devices or Devices())),
        environ=environ,
        devices=devices or Devices(),
        cores=cores,
    )


def share(workers: int, **more: Any) -> Share:
    fields: dict[str, Any] = {
        "run_id": "r",
        "attempt": 2,
        "key": "n0",
        "channel": "127.0.0.1:99",
        "master_addr": "127.0.0.1",
        "master_port": 4711,
        "workers": workers,
        "first_rank": 0,
        "world_size": workers,
    }
    return Share(**fields | more)


@pytest.mark.parametrize(
    ("settings", "devices", "workers"),
    [
        ({}, (), 1),
        ({}, ("0", "1", "2"), 3),
        ({"cpu_processes": 2}, (), 2),
        ({"cpu_processes": 2}, ("0",), 1),
        ({"nproc": 5}, ("0",), 5),
        ({"nproc": 1}, ("0", "1"), 1),
    ],
)
def test_auto_is_one_worker_per_device_and_a_number_is_that_number(
    settings: dict[str, Any], devices: tuple[str, ...], workers: int
) -> None:
    assert worker_count(LaunchSettings(**settings), Devices(devices)) == workers


def test_each_worker_has_the_environment_that_torchrun_would_give_it() -> None:
    second = plan({"HOME": "/h", "RANK": "7"}, nproc=2)[1].environment
    expected = {
        "HOME": "/h",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4711",
        "TORCHELASTIC_RUN_ID": "r",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "ALLSTEP_RUN_ID": "r",
        "ALLSTEP_ATTEMPT": "2",
        "ALLSTEP_CHANNEL": "127.0.0.1:99",
        "ALLSTEP_KEY": "n0",
        "PYTHONUNBUFFERED": "1",
    }
    assert expected.items() <= second.items()


@pytest.mark.parametrize(
    ("environ", "env", "nproc", "cores", "threads"),
    [
        ({}, {}, 2, 8, "4"),
        ({}, {}, 3, 8, "2"),
        ({}, {}, 4, 2, "1"),
        ({"OMP_NUM_THREADS": "6"}, {}, 2, 8, "6"),
        ({}, {"OMP_NUM_THREADS": "5"}, 2, 8, "5"),
        ({"OMP_NUM_THREADS": "6"}, {"OMP_NUM_THREADS": "5"}, 2, 8, "5"),
        ({}, {}, 1, 8, None),  # alone, as under plain python
    ],
)
def test_cores_are_divided_among_workers_unless_the_user_did(
    environ: dict[str, str], env: dict[str, str], nproc: int, cores: int, threads: str | None
) -> None:
    for worker in plan(environ, cores=cores, nproc=nproc, env=env):
        assert worker.environment.get("OMP_NUM_THREADS") == threads


def test_mig_instances_are_shown_one_to_a_worker_over_what_was_inherited() -> None:
    workers = plan({"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, devices=Devices(("MIG-a", "MIG-b"), apart=True))
    assert [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["MIG-a", "MIG-b"]


def test_a_machine_numbers_its_ranks_from_where_the_ones_before_it_end(tmp_path: Path) -> None:
    part = share(2, first_rank=3, world_size=5, node_rank=1, nodes=2, master_addr="head", folder=tmp_path)
    first, second = plan_workers(LaunchSettings(), Command("x"), part, environ={}, devices=Devices(), cores=8)
    assert (first.rank, second.rank, first.world_size) == (3, 4, 5)
    expected = {
        "RANK": "4",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "5",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
        "MASTER_ADDR": "head",
        "ALLSTEP_ATTEMPT_FOLDER": str(tmp_path),
    }
    assert expected.items() <= second.environment.items()


def test_an_attempt_without_a_folder_does_not_inherit_that_of_another_run() -> None:
    assert "ALLSTEP_ATTEMPT_FOLDER" not in plan({"ALLSTEP_ATTEMPT_FOLDER": "/outer"})[0].environment


def test_limits_faults_and_a_mesh_asked_for_win_over_the_environment() -> None:
    outer = {"ALLSTEP_LIMITS": "step=1", "ALLSTEP_FAULT": "rank=1,exit=3", "ALLSTEP_MESH": "data=2"}
    inherited = plan(outer)[0].environment
    given = plan(outer, limits="step=60", fault="rank=0,exit=4", mesh="shard=-1")[0].environment
    assert (inherited["ALLSTEP_MESH"], given["ALLSTEP_MESH"]) == ("data=2", "shard=-1")
    assert (inherited["ALLSTEP_LIMITS"], inherited["ALLSTEP_FAULT"]) == ("step=1", "rank=1,exit=3")
    assert (given["ALLSTEP_LIMITS"], given["ALLSTEP_FAULT"]) == ("step=60", "rank=0,exit=4")


def test_a_mesh_that_does_not_fit_the_workers_is_refused_before_they_start() -> None:
    part = share(2, first_rank=2, world_size=4, node_rank=1, nodes=2)
    command = Command("x")
    plan_workers(LaunchSettings(mesh="shard=-1"), command, part, environ={}, devices=Devices(), cores=1)
    with pytest.raises(ConfigurationError, match="tensor=3, which is 3 ranks, but the world has 4 ranks on 2 nodes"):
        plan_workers(LaunchSettings(mesh="tensor=3"), command, part, environ={}, devices=Devices(), cores=1)


@pytest.mark.parametrize("own", [None, "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"])
def test_nccls_record_of_collectives_goes_to_the_attempts_folder(tmp_path: Path, own: str | None) -> None:
    environ = {} if own is None else {own: "/elsewhere/rank_"}
    part = share(1, folder=tmp_path)
    (worker,) = plan_workers(LaunchSettings(), Command("x"), part, environ=environ, devices=Devices(), cores=8)
    found = {name: value for name, value in worker.environment.items() if name.endswith("_TEMP_FILE")}
    prefix = str(tmp_path / "flight_recorder_rank_")
    both = dict.fromkeys(("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), prefix)
    assert found == (both if own is None else environ)


def test_workers_are_told_their_type_of_device() -> None:
    assert plan({}, device="xla", nproc=1)[0].environment["ALLSTEP_DEVICE"] == "xla"
    assert "ALLSTEP_DEVICE" not in plan({}, nproc=1)[0].environment
