"""Processes that a real SLURM starts find the place that SLURM gave them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

SHOW_PLACE = (
    "import dataclasses, json, os; from allstep.placement import detect;"
    " print(json.dumps(dataclasses.asdict(detect(os.environ))))"
)


def places(output: str) -> list[dict[str, Any]]:
    return sorted(map(json.loads, output.splitlines()), key=lambda place: place["rank"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("-N2", "--ntasks-per-node=2"), [(0, 4, 0, 2, 0), (1, 4, 1, 2, 0), (2, 4, 0, 2, 1), (3, 4, 1, 2, 1)]),
        (("-N2", "-n3"), [(0, 3, 0, 2, 0), (1, 3, 1, 2, 0), (2, 3, 0, 1, 1)]),
        (("-N2", "-n4", "-m", "cyclic"), [(0, 4, 0, 3, 0), (1, 4, 0, 1, 1), (2, 4, 1, 3, 0), (3, 4, 2, 3, 0)]),
        (("-n1",), [(0, 1, 0, 1, 0)]),
    ],
    ids=["two-nodes", "uneven", "cyclic", "one-task"],
)
def test_tasks_of_a_step_are_distinct_ranks_of_one_world(
    cluster: Cluster, options: tuple[str, ...], expected: list[tuple[int, ...]]
) -> None:
    done = cluster.srun(*options, sys.executable, "-c", SHOW_PLACE)
    assert done.returncode == 0, done.stderr
    tasks = places(done.stdout)
    numbers = ("rank", "world_size", "local_rank", "local_world_size", "node_rank")
    assert [tuple(task[name] for name in numbers) for task in tasks] == expected
    assert {task["launcher"] for task in tasks} == {"slurm"}
    shared = [(task["run_id"], task["nodes"], json.dumps(task["rendezvous"])) for task in tasks]
    assert len(set(shared)) == 1


def test_where_each_task_was_put_by_hand_ranks_meet_at_rank_0s_node(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("n2\nn1\nn2\n")
    options = ("-N2", "-n3", "--distribution=arbitrary")
    show = f"unset MASTER_ADDR; exec {sys.executable} -c '{SHOW_PLACE}'"
    done = cluster.srun(*options, "sh", "-c", show, env={"SLURM_HOSTFILE": str(tmp_path / "hosts")})
    assert done.returncode == 0, done.stderr
    tasks = places(done.stdout)
    assert [task["node_rank"] for task in tasks] == [0, 1, 0]
    assert {task["rendezvous"]["host"] for task in tasks} == {"n2"}
    unknown = f"unset MASTER_ADDR SLURM_HOSTFILE; exec {sys.executable} -c '{SHOW_PLACE}'"
    done = cluster.srun(*options, "sh", "-c", unknown, env={"SLURM_HOSTFILE": str(tmp_path / "hosts")})
    assert "Set MASTER_ADDR to the name that SLURM has for the node of rank 0" in done.stderr


@pytest.mark.nightly
def test_ranks_that_were_put_on_nodes_by_hand_form_a_world(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("n2\nn1\nn2\n")
    sums = "import allstep; world = allstep.init(); print(world.rank, world.all_reduce(1)); world.close()"
    options = ("-N2", "-n3", "--distribution=arbitrary", sys.executable, "-c", sums)
    done = cluster.srun(*options, env={"SLURM_HOSTFILE": str(tmp_path / "hosts")})
    assert sorted(done.stdout.split("\n")) == ["", "0 3", "1 3", "2 3"], done.stderr


@pytest.mark.nightly
def test_a_copy_for_each_node_is_refused_where_ranks_go_around_the_nodes(cluster: Cluster) -> None:
    opened = "import allstep; world = allstep.init(mesh={'shard': -1}); print(world.mesh.shape); world.close()"
    placed = ("-N2", "-n4", "--ntasks-per-node=2", "--kill-on-bad-exit=0")
    done = cluster.srun(*placed, "-m", "cyclic", sys.executable, "-c", opened)
    assert done.returncode != 0
    assert done.stderr.count("MeshError: mesh is replicate=2,shard=2, with a copy of the model on each node") == 4
    done = cluster.srun(*placed, "-m", "block", sys.executable, "-c", opened)
    assert done.stdout.count("(2, 2)") == 4, done.stderr


def test_a_batch_script_without_srun_is_a_world_of_one_with_a_warning(cluster: Cluster) -> None:
    done = cluster.sbatch(f"#!/bin/sh\nexec {sys.executable} -c '{SHOW_PLACE}'\n", "-N2", "--ntasks-per-node=2")
    assert done.returncode == 0, done.stderr
    (place,) = places(done.stdout)
    assert (place["launcher"], place["world_size"]) == ("alone", 1)
    assert "SLURM_NTASKS=4" in place["warnings"][0]


def test_srun_of_one_task_in_a_job_of_two_nodes_is_a_world_of_one(cluster: Cluster) -> None:
    command = f"srun --mpi=none -n1 -N1 {sys.executable} -c '{SHOW_PLACE}'"
    done = cluster.sbatch(f"#!/bin/sh\n{command}\n", "-N2", "--ntasks-per-node=2")
    assert done.returncode == 0, done.stderr
    (place,) = places(done.stdout)
    assert (place["launcher"], place["world_size"], place["nodes"], place["warnings"]) == ("slurm", 1, 1, [])


def test_a_batch_script_submitted_from_a_step_does_not_take_its_place(cluster: Cluster) -> None:
    inner = cluster.folder / "inner.sh"
    output = cluster.folder / "inner.out"
    inner.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{SHOW_PLACE}'\n")
    # The inner job waits for nothing of the outer one: there are CPUs for both.
    submit = f'[ "$SLURM_PROCID" = 1 ] || exit 0; sbatch --wait -N1 -n1 --output={output} {inner}; true'
    done = cluster.srun("-N2", "-n2", "sh", "-c", submit)
    assert done.returncode == 0, done.stderr
    assert "PlacementError" in output.read_text()
    assert "inherited from another step" in output.read_text()
