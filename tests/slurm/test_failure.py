"""Under a real srun, without any supervisor of allstep's: the first cause is reported once and the step ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, cgroup_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

SCRIPT = """
import allstep
from allstep import Engine

with allstep.init() as world:
    def step(engine, batch):
        world.all_reduce(1.0)
        if world.rank == 3 and engine.state.iteration == 5:
            raise ValueError("the true cause")

    Engine(step).run(range(40), max_epochs=50)
"""


def test_a_task_that_raises_is_the_cause_and_all_tasks_of_all_nodes_end(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    # Cyclic: ranks 0 and 2 are on the first node, so that a node's ranks are not consecutive. And srun itself does not
    # end a step of which a task failed.
    done = cluster.srun(
        *("-N2", "--ntasks-per-node=2", "-m", "cyclic", "--kill-on-bad-exit=0"),
        sys.executable,
        str(script),
        env=environment,
        timeout=110,
    )
    assert done.returncode != 0
    assert done.stderr.count("allstep: run ") == 1, done.stderr
    report = done.stderr[done.stderr.index("allstep: run ") :]
    assert "rank 3 of 4" in report
    assert "ValueError: the true cause" in report
    assert "iteration 5" in report


ENDS = {
    "kill": ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    "segfault": ("ctypes.string_at(0)", "killed by SIGSEGV"),
    "abort": ("os.abort()", "killed by SIGABRT"),
    "exit": ("sys.exit(3)", "SystemExit: 3"),
    "os_exit": ("os._exit(3)", "exit code 3"),
}


def report_of_rank_alone(cluster: Cluster, folder: Path, nodes: int, rank: int, code: str) -> str:
    """The one report of a job with a rank on each node, of which one ends by `code`."""
    script = folder / "train.py"
    text = f"import ctypes, os, sys\n{SCRIPT}".replace('raise ValueError("the true cause")', code)
    script.write_text(text.replace("world.rank == 3", f"world.rank == {rank}"))
    done = cluster.srun(
        *(f"-N{nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"),
        sys.executable,
        str(script),
        env={"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"},
        timeout=110,
    )
    assert done.returncode != 0
    assert done.stderr.count("allstep: run ") == 1, done.stderr
    return done.stderr[done.stderr.index("allstep: run ") :]


@pytest.mark.parametrize(("end", "rank"), [(end, rank) for end in ENDS for rank in (0, 1)])
@pytest.mark.nightly
def test_a_rank_alone_on_its_node_is_named_with_how_it_ended(
    end: str, rank: int, cluster: Cluster, tmp_path: Path
) -> None:
    code, what = ENDS[end]
    report = report_of_rank_alone(cluster, tmp_path, 2, rank, code)
    assert f"rank {rank} of 2 failed first\n  {what}" in report


@pytest.fixture(scope="module")
def strict_cluster(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Iterator[Cluster]:
    """Three nodes on which everything of a step is killed right behind its last task."""
    with cgroup_cluster(tmp_path_factory.mktemp("strict"), nodes=3) as running:
        yield running


STRICT_ENDS = {
    **{end: (code, f"failed first\n  {what}") for end, (code, what) in ENDS.items()},
    "os_exit_0": ("os._exit(0)", "left first\n"),
}


@pytest.mark.nightly
@pytest.mark.parametrize("end", STRICT_ENDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_named_where_its_nodes_service_is_killed_with_it(
    end: str, rank: int, strict_cluster: Cluster, tmp_path: Path
) -> None:
    code, what = STRICT_ENDS[end]
    report = report_of_rank_alone(strict_cluster, tmp_path, 3, rank, code)
    assert f"rank {rank} of 3 {what}" in report
