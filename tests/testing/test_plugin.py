"""The fixture `world_of`, in a pytest of its own as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

TESTS = """
import pytest
from allstep.testing import FaultPlan, RanksError

def add(world, more):
    return world.all_reduce(world.rank + more)

def fails(world):
    if world.rank == 1:
        raise ValueError("the true cause")
    world.barrier()

def trains(world):
    from allstep import Engine
    return Engine(lambda engine, batch: world.barrier()).run(range(4)).iteration

def test_adds(world_of):
    assert world_of(2)(add, 10) == [21, 21]

def test_fails(world_of):
    world_of(2, timeout=50)(fails)

def test_expects_the_failure(world_of):
    with pytest.raises(RanksError, match="the true cause"):
        world_of(2)(fails)

def test_rehearses(world_of):
    with pytest.raises(RanksError, match="rank 0 of 2 died"):
        world_of(2, fault=FaultPlan.at(0, 2).kill(9))(trains)
    assert world_of(2, env={"SAID": "1"})(trains) == [4, 4]
"""


def run_pytest(folder: Path, *arguments: str, tests: str = TESTS) -> subprocess.CompletedProcess[str]:
    (folder / "test_mine.py").write_text(tests)
    installed = any(each.name == "allstep" for each in entry_points(group="pytest11"))
    load = [] if installed else ["-p", "allstep.testing.plugin"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *load, *arguments, "test_mine.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def test_the_package_announces_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"allstep": "allstep.testing.plugin"}


@pytest.mark.parametrize(
    "arguments", [(), pytest.param(("-n", "2"), marks=pytest.mark.nightly)], ids=["alone", "xdist"]
)
def test_a_failing_rank_fails_its_test_with_the_first_cause_and_no_other(tmp_path: Path, arguments) -> None:
    ended = run_pytest(tmp_path, *arguments)
    assert "3 passed" in ended.stdout, ended.stdout
    assert "1 failed" in ended.stdout
    shown = ended.stdout[ended.stdout.index("FAILURES") :]
    assert "rank 1 of 2 raised:" in shown
    assert "ValueError: the true cause" in shown
    assert "test_mine.py" in shown
    assert "src/allstep/testing" not in shown
    assert "did not finish" not in shown


def test_loading_the_plugin_imports_no_torch_and_starts_nothing() -> None:
    text = (
        "import os, sys, allstep.testing.plugin\n"
        "print(sorted({'torch', 'numpy'} & set(sys.modules)), end=' ')\n"
        "try:\n    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)\n"
        "except ChildProcessError:\n    print('no process')"
    )
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "[] no process\n"
