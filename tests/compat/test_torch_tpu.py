"""torch_tpu as far as it goes without a TPU: it is imported, and what it says of a machine without one is told on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat.environments import REPOSITORY, environment_with

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]

TORCH, TORCH_TPU = "torch==2.13.0", "torch_tpu==0.2.0"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The Python of an environment that has both."""
    folder = tmp_path_factory.mktemp("torch_tpu")
    try:
        yield environment_with(folder, [TORCH, TORCH_TPU], [str(REPOSITORY)])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(command: list[object], **environ: str) -> subprocess.CompletedProcess[str]:
    given = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} | environ
    return subprocess.run(list(map(str, command)), env=given, capture_output=True, text=True, timeout=400)


def said_by(python: Path, code: str, **environ: str) -> str:
    done = run([python, "-c", code], **environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_world_beside_it_is_on_the_cpu(python):
    code = "import torch_tpu, torch, allstep\nwith allstep.init() as world: print(torch.__version__, world.device)"
    version, device = said_by(python, code).split()
    assert version.startswith("2.13.0")
    assert device == "cpu"


def test_a_tpu_that_is_not_there_is_refused_with_what_is(python):
    code = (
        "import torch_tpu, allstep\n"
        "try: allstep.init(device='tpu')\n"
        "except allstep.errors.WorldError as error: print(error)"
    )
    assert "TPU is not available in this process, which has cpu" in said_by(python, code)


def test_what_its_launching_function_refuses_is_told(python, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('a worker was started')\n")
    done = run([python, "-m", "allstep", "run", "--device", "tpu", "--nproc", "4", script])
    assert done.returncode != 0
    assert "torch_tpu cannot set up its ranks" in done.stderr
    assert "expected TPU devices, got none" in done.stderr
    assert "a worker was started" not in done.stderr + done.stdout
