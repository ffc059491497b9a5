"""Under torchrun, where no supervisor of allstep's is: what the rows of the fault matrix do not say."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path

import pytest

from allstep.launch.environment import ReservedPort
from allstep.testing import FaultPlan
from tests.faults.rehearsal import SCRIPTS, check_first_lines, rehearse
from tests.jobs.job import Job
from tests.jobs.running import start

pytestmark = pytest.mark.slow

AT = FaultPlan.at(1, 5)


def over_two_nodes(folder: Path, fault: FaultPlan, script: str, *arguments: str) -> list[Job]:
    """A torchrun for each of two nodes, all on this machine, with one rank each."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | fault.to_environ()
    with ReservedPort(shared=True) as reserved, contextlib.ExitStack() as stack:
        running = []
        for node in range(2):
            at = ["--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={reserved.port}"]
            argv = [sys.executable, "-m", "torch.distributed.run", *at, "--nproc-per-node=1"]
            running.append(stack.enter_context(start(folder, [*argv, SCRIPTS / script, *arguments], env=variables)))
        return [each.end() for each in running]


@pytest.mark.nightly
def test_a_healthy_run_leaves_nothing_and_reports_nothing(tmp_path: Path) -> None:
    job = rehearse(tmp_path, "few_steps.py", "40", launcher="torchrun")
    assert job.code == 0, job.text
    assert job.text.count("trained 40") == 2
    assert "allstep: run " not in job.text  # a straggler may be named on a loaded machine


def test_ranks_of_a_second_node_are_heard_through_its_relay(tmp_path: Path) -> None:
    fault = FaultPlan.at(1, 5).raise_(ValueError("the true cause"))
    head, other = over_two_nodes(tmp_path, fault, "reduces.py", "1000")
    assert head.code != 0
    assert other.code != 0
    assert " failed: " not in other.text  # there is one report, and the head has it
    check_first_lines(head, "rank 1 of 2", "ValueError: the true cause", "iteration 5")


ENDS = {
    "kill": (AT.kill(signal.SIGKILL), "killed by SIGKILL"),
    "segfault": (AT.segfault(), "killed by SIGSEGV"),
    "abort": (AT.abort(), "killed by SIGABRT"),
    "exit": (AT.exit(3), "SystemExit: 3"),
}


@pytest.mark.nightly
@pytest.mark.parametrize("end", ENDS)
def test_a_rank_alone_on_the_second_node_is_named_with_how_it_ended(end: str, tmp_path: Path) -> None:
    fault, what = ENDS[end]
    head, other = over_two_nodes(tmp_path, fault, "reduces.py", "100000")
    assert head.code != 0
    assert " failed: " not in other.text
    check_first_lines(head, "rank 1 of 2 failed first", what)


@pytest.mark.nightly
def test_a_node_whose_ranks_come_and_go_leaves_nothing(tmp_path: Path) -> None:
    for job in over_two_nodes(tmp_path, FaultPlan(), "few_steps.py", "40"):
        assert job.code == 0, job.text
        assert "trained 40" in job.text
