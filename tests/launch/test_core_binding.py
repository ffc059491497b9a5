"""Which cores workers get of what SLURM granted, as tables; and that a worker runs on them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from allstep.launch import core_binding
from allstep.launch.core_binding import CpuTopology, bind_workers, gpu_nodes, granted_cores, see_topology, share_cores

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}

# Two sockets of four cores with two threads each: CPU 8 is the second thread of core 0.
TWO_SOCKETS = CpuTopology({cpu: cpu % 8 // 4 for cpu in range(16)}, {cpu: cpu % 8 for cpu in range(16)})


@pytest.mark.parametrize(
    ("variables", "granted"),
    [
        ({"SLURM_CPUS_PER_TASK": "8", "SLURM_CPUS_ON_NODE": "16"}, 8),
        ({"SLURM_CPUS_ON_NODE": "16"}, 16),
        ({}, None),
        ({"SLURM_CPUS_PER_TASK": "many"}, None),
        ({"SLURM_CPUS_PER_TASK": "8", "SLURM_STEP_ID": "4294967291"}, None),  # a batch script is no task
    ],
)
def test_what_slurm_granted_is_read_in_a_step_alone(variables: dict[str, str], granted: int | None) -> None:
    assert granted_cores(STEP | variables) == granted
    assert granted_cores({name: text for name, text in variables.items() if name != "SLURM_STEP_ID"}) is None


@pytest.mark.parametrize(
    ("allowed", "near", "topology", "shares"),
    [
        (range(4), [None, None], CpuTopology(), [(0, 1), (2, 3)]),
        (range(5), [None, None], CpuTopology(), [(0, 1, 4), (2, 3)]),
        (range(1), [None, None], CpuTopology(), []),
        # Both threads of a core stay together.
        (range(16), [None] * 4, TWO_SOCKETS, [(0, 1, 8, 9), (2, 3, 10, 11), (4, 5, 12, 13), (6, 7, 14, 15)]),
        (range(16), [1, 1, 0, 0], TWO_SOCKETS, [(4, 5, 12, 13), (6, 7, 14, 15), (0, 1, 8, 9), (2, 3, 10, 11)]),
        # One socket cannot serve all: the others get what is left, and a GPU of an unknown place takes none from it.
        (range(8), [1, 1, 1], TWO_SOCKETS, [(2, 4, 5), (3, 6, 7), (0, 1)]),
        (range(8), [None, 0], TWO_SOCKETS, [(4, 5, 6, 7), (0, 1, 2, 3)]),
    ],
)
def test_cores_are_shared_equally_and_near_the_gpu(
    allowed: range, near: list[int | None], topology: CpuTopology, shares: list[tuple[int, ...]]
) -> None:
    found = share_cores(allowed, near, topology)
    assert list(found) == shares


@pytest.mark.parametrize(
    ("granted", "workers", "variables"), [(2, 2, {}), (4, 1, {}), (8, 2, {}), (4, 2, {"OMP_PROC_BIND": "false"})]
)
def test_no_worker_is_bound_where_its_cores_are_not_known(
    granted: int, workers: int, variables: dict[str, str]
) -> None:
    assert bind_workers(range(4), granted, (), workers, variables) == ()


def test_a_machine_is_read_from_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node, cpus in enumerate(("0-1,4-5", "2-3,6-7")):
        (folder := tmp_path / f"sys/devices/system/node/node{node}").mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
    for cpu in range(8):
        (folder := tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology").mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    for bus, node in (("0000:3b:00.0", 1), ("0000:af:00.0", 0), ("0000:d8:00.0", -1)):
        (folder := tmp_path / f"sys/bus/pci/devices/{bus}").mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    program = tmp_path / "nvidia-smi"
    listed = "0, GPU-a, 00000000:3B:00.0\n1, GPU-b, 00000000:AF:00.0\n2, GPU-c, 00000000:D8:00.0\n3, GPU-d, [N/A]"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{listed}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    topology = see_topology(tmp_path)
    assert topology.numa == {0: 0, 1: 0, 4: 0, 5: 0, 2: 1, 3: 1, 6: 1, 7: 1}
    assert topology.siblings == {cpu: cpu % 4 for cpu in range(8)}
    assert gpu_nodes(tmp_path) == {"0": 1, "GPU-a": 1, "1": 0, "GPU-b": 0}
    monkeypatch.setattr(core_binding, "see_topology", lambda: topology)
    monkeypatch.setattr(core_binding, "gpu_nodes", lambda: gpu_nodes(tmp_path))
    assert bind_workers(range(8), 8, ("0", "1"), 2, {}) == ((2, 3, 6, 7), (0, 1, 4, 5))


def test_a_machine_that_says_nothing_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert see_topology(tmp_path) == CpuTopology()
    assert gpu_nodes(tmp_path) == {}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be divided")
def test_workers_of_a_step_run_on_cores_of_their_own(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text("import os; print(sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'], flush=True)\n")
    cores = sorted(os.sched_getaffinity(0))
    task = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_NODELIST": "n1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_CPUS_PER_TASK": str(len(cores)),
    }
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMP_"))} | task
    command = [sys.executable, "-m", "allstep", "run", "--nproc", "2", f"--runs={tmp_path}/runs", str(script)]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = [line.split("] ", 1)[1] for line in sorted(done.stdout.splitlines())]
    sets = [set(map(int, line.rpartition("] ")[0].strip("[").split(","))) for line in shown]
    assert sets[0] | sets[1] == set(cores)
    assert not sets[0] & sets[1]
    assert {line.rpartition(" ")[2] for line in shown} == {str(max(1, len(cores) // 2))}
