"""`allstep run` as one task per node under a real SLURM: its place comes from SLURM's variables."""

from __future__ import annotations

import sys

import pytest

from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

SAY = """
import os, sys
rank = int(os.environ["RANK"])
print([os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK")], flush=True)
if rank == 3 and len(sys.argv) > 1 and os.environ["ALLSTEP_ATTEMPT"] == "0":
    raise ValueError("bad batch")
"""


def launch(cluster: Cluster, *arguments: str, tasks: int = 1) -> tuple[int, str, str]:
    (cluster.folder / "say.py").write_text(SAY)
    command = [sys.executable, "-m", "allstep", "run", *arguments]
    done = cluster.srun("-N2", f"--ntasks-per-node={tasks}", *command, env={"PYTHONPATH": ":".join(sys.path)})
    return done.returncode, done.stdout, done.stderr


def test_a_task_per_node_is_a_machine_of_the_run(cluster: Cluster) -> None:
    code, out, said = launch(cluster, "--nproc", "2", "say.py")
    assert code == 0, said
    assert sorted(out.splitlines()) == [f"[{rank}] ['{rank}', '{rank % 2}', '4', '{rank // 2}']" for rank in range(4)]
    assert "node 1 of 2" in said


def test_the_first_node_restarts_the_workers_of_all(cluster: Cluster) -> None:
    code, out, said = launch(cluster, "--nproc", "2", "--max-restarts", "1", "say.py", "fail")
    assert code == 0, said
    assert len(out.splitlines()) == 8
    assert "attempt 0 failed: rank 3: exit code 1 (ValueError: bad batch); restart 1 of at most 1" in said


def test_several_tasks_on_a_node_are_refused_with_the_remedy(cluster: Cluster) -> None:
    code, out, said = launch(cluster, "say.py", tasks=2)
    assert (code, out) == (2, "")
    assert "srun started 2 tasks on this node" in said
    assert "--ntasks-per-node=1 allstep run" in said
