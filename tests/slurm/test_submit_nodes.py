"""What jobs of `allstep submit` get of a real SLURM's nodes: GPUs that differ from node to node, cores, whole nodes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.test_submit import Submitted

pytestmark = [
    *(pytest.mark.slurm, pytest.mark.slow, pytest.mark.nightly, pytest.mark.xdist_group("slurm")),
    pytest.mark.timeout(200),
    pytest.mark.skipif(os.geteuid() != 0, reason="fake GPUs are device files, which root makes"),
]

# Standard library only, so that a job takes a second.
SHOW = """
import os
name = lambda *names: next((os.environ[each] for each in names if each in os.environ), None)
rank, world = name("RANK", "SLURM_PROCID"), name("WORLD_SIZE", "SLURM_NTASKS")
cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
print(f"rank {rank} of {world} on {name('SLURMD_NODENAME')}: gpus {name('CUDA_VISIBLE_DEVICES')} "
      f"threads {name('OMP_NUM_THREADS')} cores {cores}.", flush=True)
"""
LISTING = "\n".join(f"GPU {index}: Fake (UUID: GPU-{index:08x})" for index in range(4))
CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def uneven(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, one with four GPUs and one with two."""
    with Cluster(tmp_path_factory.mktemp("uneven"), nodes=2, gpus=(4, 2)) as running:
        yield running


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A node of as many CPUs as there are here."""
    with Cluster(tmp_path_factory.mktemp("whole"), nodes=1, cpus=len(CORES)) as running:
        yield running


def shown(cluster: Cluster, project: Path, *options: str) -> list[tuple[str, ...]]:
    """Rank, world, node, GPUs, threads and cores of each rank of a job, in the order of ranks."""
    (project / "show.py").write_text(SHOW)
    (project / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}\nEND\n")
    (project / "nvidia-smi").chmod(0o755)
    job = Submitted(cluster, project)
    path = f"{project}:{os.environ['PATH']}"
    done = job.submit(*options, "show.py", PATH=path, unset="OMP_NUM_THREADS")
    assert done.returncode == 0, done.stderr
    job.until(job.has_finished)
    pattern = r"rank (\d+) of (\d+) on (\w+): gpus (\S+) threads (\S*) cores (\S+)\."
    return sorted(re.findall(pattern, job.said))


def test_each_node_has_a_worker_for_each_of_its_gpus(uneven: Cluster, tmp_path: Path) -> None:
    ranks = shown(uneven, tmp_path, "--nodes=2", "--gpus=6")
    assert [(rank, world, node) for rank, world, node, *_ in ranks] == [
        (str(rank), "6", "n1" if rank < 4 else "n2") for rank in range(6)
    ]
    assert {gpus for _, _, node, gpus, *_ in ranks if node == "n2"} == {"0,1"}


def test_there_is_a_task_for_each_gpu_of_each_node(uneven: Cluster, tmp_path: Path) -> None:
    ranks = shown(uneven, tmp_path, "--nodes=2", "--gpus-per-node=2", "--tasks-per-gpu=1")
    assert len(ranks) == 4
    assert {world for _, world, *_ in ranks} == {"4"}
    assert all(len(gpus.split(",")) == 1 for _, _, _, gpus, *_ in ranks), ranks
    seen = [(node, gpus) for _, _, node, gpus, *_ in ranks]
    assert len(set(seen)) == 4, seen


def test_each_task_sees_its_own_gpu(uneven: Cluster, tmp_path: Path) -> None:
    ranks = shown(uneven, tmp_path, "--nodes=1", "--tasks-per-node=2", "--gpus-per-task=1", "--cpus-per-task=1")
    assert [(rank, world, threads) for rank, world, _, _, threads, _ in ranks] == [("0", "2", "1"), ("1", "2", "1")]
    assert len({gpus for _, _, _, gpus, *_ in ranks}) == 2
    assert all("," not in gpus for _, _, _, gpus, *_ in ranks)


@pytest.mark.skipif(len(CORES) < 2, reason="one core cannot be divided")
@pytest.mark.parametrize("how", ["--cpus-per-task", "--exclusive"])
def test_workers_of_a_node_share_its_cores(how: str, whole: Cluster, tmp_path: Path) -> None:
    options = (f"{how}={len(CORES)}",) if how == "--cpus-per-task" else ("--sbatch", "--exclusive")
    ranks = shown(whole, tmp_path, "--nodes=1", "--nproc=2", *options)
    cores = [set(map(int, each.split(","))) for *_, each in ranks]
    assert cores[0] | cores[1] == set(CORES)
    assert not cores[0] & cores[1]
    assert [threads for *_, threads, _ in ranks] == [str(len(CORES) // 2)] * 2


def test_on_a_shared_node_threads_are_those_of_the_granted_cores(cluster: Cluster, tmp_path: Path) -> None:
    ranks = shown(cluster, tmp_path, "--nodes=1", "--nproc=1", "--cpus-per-task=1")
    assert [threads for *_, threads, _ in ranks] == ["1"]
