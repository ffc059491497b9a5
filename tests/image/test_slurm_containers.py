"""The batch scripts of the page on containers, on a real SLURM, with the image that the Dockerfile makes.

Pyxis with enroot, and Apptainer, come in no package of Debian's: where they are not installed the tests are skipped.
SLURM runs as root on two virtual nodes. The scripts are taken from the page, for two nodes without GPUs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.image.conftest import TAG
from tests.image.image_store import ImageStore
from tests.jobs.launchers import ROOT
from tests.jobs.programs import SYSTEM_PATH, ProgramsUnavailable
from tests.slurm.cluster import Cluster, ensure_installed
from tests.slurm.test_submit import TRAIN

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("image"),
]

PYXIS = Path("/usr/local/lib/slurm/spank_pyxis.so")
RESOURCES = "--nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=96"


def squashed(store: ImageStore, folder: Path) -> Path:
    """What `enroot import` makes of an image in Docker: its root with three files that say how it is started."""
    root, settings = store.root(TAG), store.settings(TAG)
    (root / "etc/environment").write_text("\n".join(settings["Env"]) + "\n")
    (root / "etc/fstab").write_text("")
    entrypoint = " ".join(settings["Entrypoint"])
    (root / "etc/rc").write_text(f'cd {settings["WorkingDir"]} || exit 1\nexec {entrypoint} "$@"\n')
    path = folder / "allstep.sqsh"
    make(["mksquashfs", str(root), str(path), "-all-root", "-comp", "lzo", "-noD", "-no-progress"])
    return path


def built_by_apptainer(store: ImageStore, folder: Path) -> Path:
    """What `docker save` and `apptainer build` make of it."""
    archive, path = folder / "allstep.tar", folder / "allstep.sif"
    store.save(TAG, archive)
    make(["apptainer", "build", str(path), f"docker-archive:{archive}"])
    archive.unlink()
    return path


def make(command: list[str]) -> None:
    done = subprocess.run(command, env={**os.environ, "PATH": SYSTEM_PATH}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster in which srun has Pyxis's options, where Pyxis is installed."""
    try:
        ensure_installed(os.environ)
    except ProgramsUnavailable as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "plugstack.conf").write_text(f"required {PYXIS} runtime_path={folder}/pyxis\n" if PYXIS.exists() else "")
    with Cluster(folder, configuration=f"PlugStackConfig={folder}/plugstack.conf") as running:
        yield running


@pytest.fixture(params=["Pyxis", "Apptainer"])
def batch_script(request: pytest.FixtureRequest, store: ImageStore, tmp_path: Path) -> str:
    """A script of the page, with the image where it says and the project in place of /scratch/ada."""
    if request.param == "Pyxis":
        if not PYXIS.exists() or shutil.which("enroot", path=SYSTEM_PATH) is None:
            pytest.skip(f"no enroot on PATH, or no Pyxis at {PYXIS}")
        squashed(store, tmp_path)
    else:
        if shutil.which("apptainer", path=SYSTEM_PATH) is None:
            pytest.skip("no apptainer on PATH")
        built_by_apptainer(store, tmp_path)
    page = (ROOT / "docs/howto/containers.md").read_text()
    found = re.search(rf'=== "{request.param}"\n\n    ```bash\n(.*?)    ```', page, re.DOTALL)
    assert found is not None
    text = textwrap.dedent(found[1])
    assert RESOURCES in text
    text = text.replace(RESOURCES, "--nodes=2 --ntasks-per-node=1 --cpus-per-task=1")
    return text.replace("/scratch/ada", str(tmp_path)).replace("/scratch", str(tmp_path))


def until(holds: Callable[[], bool], log: Path, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.1)  # the cluster tells nobody, so it is asked again


def trained(cluster: Cluster, batch_script: str, folder: Path, pause: float, *, preempt: bool) -> list[torch.Tensor]:
    """The parameters with which a job ends, anew; it can be preempted once."""
    (folder / "train.py").write_text(TRAIN)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    result, log, path = folder / "out.pt", folder / "log.txt", folder / "job.sh"
    result.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    path.write_text(batch_script.replace("train.py", f"train.py 3 {pause}"))
    options = (f"--output={log}", f"--chdir={folder}", "--export=ALL", "--parsable")
    number = cluster.run("sbatch", *options, str(path), env={"OMP_NUM_THREADS": "1"}).stdout.strip()
    if preempt:
        until(lambda: log.exists() and "iteration 3" in log.read_text(), log)
        cluster.run("scancel", "--signal=USR1", number)
        until(lambda: "PENDING" in cluster.run("squeue", "--noheader", "--format=%T", "--jobs", number).stdout, log)
        assert not result.exists()
        cluster.run("scontrol", "update", f"job={number}", "StartTime=now")
    until(lambda: cluster.run("squeue", "--noheader", "--jobs", number).stdout == "", log)
    assert result.exists(), log.read_text()
    parameters: list[torch.Tensor] = torch.load(result, weights_only=True)
    return parameters


def test_a_job_in_containers_is_preempted_and_goes_on(cluster: Cluster, batch_script: str, tmp_path: Path) -> None:
    unbroken = trained(cluster, batch_script, tmp_path, 0.0, preempt=False)
    resumed = trained(cluster, batch_script, tmp_path, 0.3, preempt=True)
    assert all(torch.equal(one, other) for one, other in zip(unbroken, resumed, strict=True))
