"""`allstep run` uses the interpreter of the environment that is active."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from allstep.cli.active_environment import active_interpreter
from tests.jobs.launchers import ROOT, environment, script

COMMAND = Path(sys.executable).with_name("allstep")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "env"
    venv.create(folder, symlinks=True)
    return folder


def started(folder: Path, active: Path, *, finds_allstep: bool) -> subprocess.CompletedProcess[str]:
    variables = environment({"VIRTUAL_ENV": str(active)})
    if not finds_allstep:
        variables.pop("PYTHONPATH")
    path = script(folder, "print(sys.prefix)")
    command = [str(COMMAND), "run", "--nproc", "1", str(path)]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=True)


@pytest.mark.skipif(not COMMAND.exists(), reason="allstep's command is not installed beside this interpreter")
def test_workers_run_in_the_active_environment_where_it_has_allstep(tmp_path: Path, other: Path) -> None:
    done = started(tmp_path, other, finds_allstep=True)  # by PYTHONPATH, as --system-site-packages would
    assert done.stdout.strip() == str(other)


@pytest.mark.skipif(not COMMAND.exists(), reason="allstep's command is not installed beside this interpreter")
def test_an_active_environment_without_allstep_is_told(tmp_path: Path, other: Path) -> None:
    done = started(tmp_path, other, finds_allstep=False)
    assert done.stdout.strip() == sys.prefix
    assert f"the active environment {other} has no allstep" in done.stderr


def test_the_same_environment_and_python_m_change_nothing(tmp_path: Path, other: Path) -> None:
    assert active_interpreter({}, sys.prefix, "/x/bin/allstep") is None
    assert active_interpreter({"VIRTUAL_ENV": str(other)}, str(other), "/x/bin/allstep") is None
    main = str(ROOT / "src" / "allstep" / "__main__.py")
    assert active_interpreter({"VIRTUAL_ENV": str(other)}, sys.prefix, main) is None
    chosen = active_interpreter({"CONDA_PREFIX": str(other)}, sys.prefix, "/x/bin/allstep")
    assert chosen == os.path.join(other, "bin", "python")
