"""Rows of the fault matrix under torchrun, where no supervisor of allstep's is: the report is printed once with the
right cause, all processes end, and no service is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.torchrun import Ran, torchrun

pytestmark = pytest.mark.slow

TRAINS = """
import os, signal, sys, time
import torch
import allstep
from allstep import Engine, Events

def fail(engine):
    {fault}

with allstep.init() as world:
    model = world.wrap(torch.nn.Linear(4, 2))

    def step(engine, batch):
        model(batch).sum().backward()
        if world.rank == 1 and engine.state.iteration == 5:
            fail(engine)

    try:
        Engine(step, name="trainer").run([torch.ones(3, 4)] * 40, max_epochs=50)
    finally:
        {cleanup}
"""

BOUND = 60.0  # seconds for the whole of it on a loaded machine, start-up included; torchrun itself takes up to 30


def trains(folder: Path, fault: str, cleanup: str = "pass") -> Ran:
    return torchrun(folder, TRAINS.format(fault=fault, cleanup=cleanup))


def assert_one_report(ran: Ran, *said: str) -> None:
    assert ran.code != 0
    assert ran.output.count("allstep: ") == 1, ran.output
    for text in said:
        assert text in ran.report
    assert ran.left == []
    assert ran.seconds < BOUND


def test_a_healthy_run_leaves_nothing_and_reports_nothing(tmp_path: Path) -> None:
    ran = trains(tmp_path, "pass")
    assert (ran.code, ran.left) == (0, []), ran.output
    assert "allstep: " not in ran.output


def test_a_rank_that_raises_is_the_cause_with_its_place_and_traceback(tmp_path: Path) -> None:
    ran = trains(tmp_path, "raise ValueError('the true cause')")
    assert_one_report(ran, "rank 1", "ValueError: the true cause", "iteration 5", "in fail")


def test_the_error_before_a_slow_clean_up_is_the_one_that_is_reported(tmp_path: Path) -> None:
    cleanup = "torch.distributed.destroy_process_group() if world.rank == 1 else None; time.sleep(4 * world.rank)"
    ran = trains(tmp_path, "raise ValueError('the true cause')", cleanup)
    assert_one_report(ran, "rank 1", "ValueError: the true cause")


def test_a_killed_rank_is_the_cause(tmp_path: Path) -> None:
    ran = trains(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert_one_report(ran, "rank 1", "killed")


def test_a_rank_that_ends_early_with_code_0_is_the_cause(tmp_path: Path) -> None:
    ran = torchrun(tmp_path, LEAVES_EARLY)
    assert_one_report(ran, "rank 1", "left early")


def test_an_exception_without_a_with_block_is_reported_by_the_excepthook(tmp_path: Path) -> None:
    ran = torchrun(tmp_path, NO_WITH)
    assert_one_report(ran, "rank 1", "KeyError", "missing")


def test_ranks_of_a_second_node_are_heard_through_its_relay(tmp_path: Path) -> None:
    ran = torchrun(
        tmp_path, TRAINS.format(fault="raise ValueError('the true cause')", cleanup="pass"), ranks=1, nodes=2
    )
    assert_one_report(ran, "rank 1 of 2", "ValueError: the true cause", "iteration 5")


def test_a_node_whose_ranks_come_and_go_leaves_nothing(tmp_path: Path) -> None:
    ran = torchrun(tmp_path, TRAINS.format(fault="pass", cleanup="pass"), ranks=1, nodes=2)
    assert (ran.code, ran.left) == (0, []), ran.output


LEAVES_EARLY = """
import sys, time
import allstep

world = allstep.init()
world.barrier()
if world.rank == 1:
    sys.exit(0)
world.barrier()
"""

NO_WITH = """
import allstep

world = allstep.init()
world.barrier()
if world.rank == 1:
    {}["missing"]
world.barrier()
"""
