"""`launch/torchrun.sh` on two hosts, as docs/howto/torchrun.md has it: a run, a failure, and going on after it."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from allstep.testing import FaultPlan
from tests.hosts.bridged import BridgedHosts
from tests.hosts.conftest import opened_bridge
from tests.jobs.job import Job
from tests.jobs.launchers import ROOT
from tests.jobs.programs import SYSTEM_PATH
from tests.jobs.running import start

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(600)]

RUN_S = 300.0


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[BridgedHosts]:
    with opened_bridge(tmp_path, 2) as made:
        yield made


def trained(hosts: BridgedHosts, folder: Path, *arguments: str, **variables: str) -> list[Job]:
    """The script on both hosts with the digits, in an environment that is there already."""
    ready = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    if not (folder / "launch").exists():
        (folder / "launch").mkdir()
        (folder / "launch" / "torchrun.sh").symlink_to(ROOT / "launch" / "torchrun.sh")
        (folder / "launch" / "environment.sh").write_text(f"allstep_environment() {{ {ready}; }}\n")
        (folder / "examples").symlink_to(ROOT / "examples")
    environ = {"PATH": SYSTEM_PATH, "OMP_NUM_THREADS": "1", "ALLSTEP_SECRET": "0123456789abcdef"}
    environ |= {"NNODES": "2", "HEAD": f"{hosts.names[0]}:29500", "NPROC": "1", **variables}
    command = [folder / "launch" / "torchrun.sh", "examples/digits.py", *arguments]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(start(folder, [*hosts.inside(host), *command], env=environ)) for host in (0, 1)]
        return [each.end(limit=RUN_S) for each in running]


def test_torchrun_trains_over_two_hosts(hosts: BridgedHosts, tmp_path: Path) -> None:
    first, second = trained(hosts, tmp_path, "--epochs", "3")
    assert [first.code, second.code] == [0, 0], first.text + second.text
    out = first.out + second.out  # torchrun says which host has rank 0
    assert "2 rank(s) on cpu" in out
    assert out.count("epoch  3:") == 1
    assert "do not have the same secret" not in first.text + second.text


def test_a_failure_on_the_second_host_is_reported_once_and_the_run_can_go_on(
    hosts: BridgedHosts, tmp_path: Path
) -> None:
    kept = ("--epochs", "4", "--checkpoints", "kept", "--checkpoint-every", "20 iterations")
    fault = FaultPlan.at(1, 60).raise_(ValueError("the true cause"))
    first, second = trained(hosts, tmp_path, *kept, **fault.to_environ())
    said = first.text + second.text
    assert first.code, said
    assert second.code, said
    assert said.count("failed first") == 1, said
    assert "ValueError: the true cause" in said
    first, second = trained(hosts, tmp_path, *kept)
    said = first.text + second.text
    assert [first.code, second.code] == [0, 0], said
    assert said.count("epoch  4:") == 1
    assert "epoch  1:" not in said
