"""What the Dockerfile makes, built and run: by its own user and by one that nobody knows, with a read-only root."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.image.conftest import TAG
from tests.image.containers import NOBODY_KNOWN, started
from tests.image.image_store import ImageStore
from tests.jobs.job import Job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("image"),
]

RUN_S = 600.0
"""Seconds that a container may take; most of it is importing torch, from a disk that is busy."""

USERS = pytest.mark.parametrize("user", [pytest.param(None, id="own user"), pytest.param(NOBODY_KNOWN, id="unknown")])


@pytest.fixture(scope="module")
def settings(store: ImageStore) -> Mapping[str, Any]:
    return store.settings(TAG)


@pytest.fixture(scope="module")
def root(store: ImageStore) -> Path:
    return store.root(TAG)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder that any user can write, as a volume is."""
    folder = tmp_path / "runs"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def run(root: Path, settings: Mapping[str, Any], folder: Path, *arguments: str, **more: Any) -> Job:
    """A container to its end."""
    with started(root, settings, folder, *arguments, **more) as container:
        return container.job.end(limit=RUN_S)


def test_the_image_is_of_a_user_without_rights_and_starts_allstep(settings: Mapping[str, Any]) -> None:
    assert settings["User"] == "10001"
    assert settings["Entrypoint"] == ["allstep"]
    assert settings["WorkingDir"] == "/home/allstep"


@USERS
def test_the_quickstart_trains(
    user: int | None, root: Path, settings: Mapping[str, Any], runs: Path, tmp_path: Path
) -> None:
    quickstart = ["--config", "configs/quickstart.yaml", "examples/digits.py", "--out", "/runs/metrics.jsonl"]
    job = run(root, settings, tmp_path / "c", "run", "--runs", "/runs", *quickstart, user=user, mounts={"/runs": runs})
    assert job.code == 0, job.text
    assert "2 rank(s) on cpu" in job.out
    last = json.loads((runs / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test_accuracy"] > 0.9


@USERS
def test_it_runs_where_nothing_but_tmp_can_be_written(
    user: int | None, root: Path, settings: Mapping[str, Any], tmp_path: Path
) -> None:
    job = run(root, settings, tmp_path / "c", "run", "--nproc", "2", "examples/digits.py", "--epochs", "1", user=user)
    assert job.code == 0, job.text
    assert "going on without logs" in job.err


@USERS
def test_the_doctor_finds_the_container_well(
    user: int | None, root: Path, settings: Mapping[str, Any], runs: Path, tmp_path: Path
) -> None:
    options = ["--json", "--nproc", "2", "--folder", "/runs"]
    job = run(root, settings, tmp_path / "c", "doctor", *options, user=user, mounts={"/runs": runs})
    assert job.code == 0, job.text
    assert [each for each in json.loads(job.out) if each["verdict"] != "good"] == []
    assert job.ended - job.began < 10


@USERS
def test_a_preempted_job_goes_on_to_the_same_parameters(
    user: int | None, root: Path, settings: Mapping[str, Any], runs: Path, tmp_path: Path
) -> None:
    def arguments(name: str) -> list[str]:
        script = ["examples/digits.py", "--epochs", "4", "--save", f"/runs/{name}.pt"]
        places = ["--checkpoints", f"/runs/{name}", "--checkpoint-every", "5 iterations"]
        return ["run", "--nproc", "2", "--runs", "/runs", "--name", name, *script, *places]

    more: dict[str, Any] = {"user": user, "mounts": {"/runs": runs}}
    unbroken = run(root, settings, tmp_path / "a", *arguments("unbroken"), **more)
    assert unbroken.code == 0, unbroken.text
    with started(root, settings, tmp_path / "b", *arguments("preempted"), **more) as container:
        container.job.await_line("epoch  1")
        container.stop()
        job = container.job.end(limit=RUN_S)
    assert job.code == 85, job.text
    assert not (runs / "preempted.pt").exists()
    resumed = run(root, settings, tmp_path / "c", *arguments("preempted"), **more)
    assert resumed.code == 0, resumed.text
    assert "epoch  1" not in resumed.out
    weights = [torch.load(runs / f"{name}.pt", weights_only=True) for name in ("unbroken", "preempted")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    own = {path.stat().st_uid for path in runs.rglob("*")}
    assert own == {int(settings["User"]) if user is None else user}


def test_torch_compile_can_name_its_cache_for_a_user_that_nobody_knows(
    root: Path, settings: Mapping[str, Any], tmp_path: Path
) -> None:
    asks = ["python3", "-c", "import getpass, os; print(getpass.getuser(), os.getuid(), os.path.expanduser('~'))"]
    job = run(root, settings, tmp_path / "c", user=NOBODY_KNOWN, entrypoint=asks)
    assert job.out == f"allstep {NOBODY_KNOWN} /home/allstep\n", job.text


def test_the_root_cannot_be_written_and_the_user_gains_no_rights(
    root: Path, settings: Mapping[str, Any], tmp_path: Path
) -> None:
    asks = ["sh", "-c", "touch /home/allstep/x; grep -E 'CapEff|NoNewPrivs' /proc/self/status"]
    job = run(root, settings, tmp_path / "c", entrypoint=asks)
    assert "Read-only file system" in job.err
    assert re.search(r"CapEff:\s0+\nNoNewPrivs:\s1\n", job.out)


def test_build_tools_and_caches_stay_behind(store: ImageStore, root: Path) -> None:
    assert not list(root.glob("usr/bin/*gcc*"))
    assert not list(root.glob("var/lib/apt/lists/*_Packages*"))
    assert not (root / "root/.cache").exists()
    assert not (root / "src").exists()
    largest, *_ = sorted(store.layers(TAG), key=lambda layer: layer.size, reverse=True)
    assert "/opt/allstep" in largest.instruction  # the environment with torch, and nothing beside it
