"""The job script launch/slurm.sbatch under a real SLURM."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

JOB = str(Path(__file__).parents[2] / "launch/slurm.sbatch")


@pytest.fixture
def submit_folder(cluster: Cluster) -> Iterator[Path]:
    """Jobs are submitted from here, where a repository has its .venv."""
    environment = cluster.folder / ".venv"
    environment.symlink_to(sys.prefix)
    yield cluster.folder
    environment.unlink()


def test_the_job_script_runs_a_rank_per_task(cluster: Cluster, submit_folder: Path) -> None:
    script = submit_folder / "where.py"
    script.write_text(
        "import os, sys\nfrom allstep.placement import detect\nplace = detect(os.environ)\n"
        "print(place.rank, place.world_size, place.nodes, sys.argv[1:])\n"
    )
    done = cluster.run("sbatch", "--wait", "--parsable", "--nodes=2", JOB, "where.py", "--lr", "0.1")
    assert done.returncode == 0, done.stderr
    said = (submit_folder / f"slurm-{done.stdout.strip()}.log").read_text().splitlines()
    assert sorted(said) == [f"{rank}: {rank} 4 2 ['--lr', '0.1']" for rank in range(4)]


def test_a_failed_task_ends_its_peers_and_the_job_fails(cluster: Cluster, submit_folder: Path) -> None:
    script = submit_folder / "fail.py"
    script.write_text(
        "import os, signal, sys\nif os.environ['SLURM_PROCID'] == '1':\n    sys.exit(5)\nsignal.pause()\n"
    )
    done = cluster.run("sbatch", "--wait", "--parsable", JOB, "fail.py")
    said = (submit_folder / f"slurm-{done.stdout.strip()}.log").read_text()
    assert done.returncode != 0, said  # srun gives the largest code: here that of the peers it ended
    assert "task 1: Exited with exit code 5" in said


@pytest.mark.nightly
def test_the_job_script_trains_the_language_model(cluster: Cluster, submit_folder: Path) -> None:
    example = Path(JOB).parents[1] / "examples/language_model.py"
    size = ["--modules", "b*.py", "--width", "32", "--layers", "2", "--heads", "2", "--length", "32", "--rate", "0.01"]
    options = [*size, "--steps", "12", "--evaluate", "6", "--checkpoints", "checkpoints"]
    printed = []
    for _ in range(2):  # a second job goes on where the first ended, and has nothing left to do
        done = cluster.run("sbatch", "--wait", "--parsable", JOB, str(example), *options)
        said = (submit_folder / f"slurm-{done.stdout.strip()}.log").read_text()
        assert done.returncode == 0, said
        printed.append(said)
    assert "2 rank(s) on cpu" in printed[0]
    assert "step 6: loss" in printed[0]
    assert "step 12: loss" in printed[0]
    assert "step 6: loss" not in printed[1]
