"""A process that is forked from a rank: it ends as any, and the rank's World is none of its business."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import allstep
from allstep import Engine, World
from allstep.errors import WorldError
from allstep.monitor.own_stacks import StacksTimer
from allstep.testing import run_ranks
from tests.jobs.launchers import Launcher, also_under_torchrun_by_night, command
from tests.jobs.running import run


def in_a_child(act: Callable[[], None]) -> int:
    """The exit code of a forked child that calls `act`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _a_child_tries(world: World) -> list[int]:
    def refused(use: Callable[[], object]) -> Callable[[], None]:
        def act() -> None:
            with pytest.raises(WorldError, match=f"belongs to rank {world.rank}, from which this process was forked"):
                use()

        return act

    def knows_its_rank() -> None:
        assert World.current() is world
        assert world.world_size == 2
        world.close()

    tries = [
        knows_its_rank,
        refused(lambda: world.all_reduce(1.0)),
        refused(lambda: Engine(lambda engine, batch: None).run([1, 2])),
        refused(allstep.init),
    ]
    codes = [in_a_child(each) for each in tries]
    assert world.all_reduce(1.0) == world.world_size  # the ranks are as they were
    return codes


def test_a_child_of_a_rank_crosses_no_ranks_and_closes_nothing() -> None:
    assert run_ranks(_a_child_tries, 2) == [[0, 0, 0, 0]] * 2


SCRIPT = """
import os, sys, allstep
with allstep.init() as world:
    world.all_reduce(1.0)
    child = os.fork()
    if child == 0:
        sys.exit(3)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), world.all_reduce(1.0), flush=True)
"""


@also_under_torchrun_by_night
def test_a_child_that_calls_sys_exit_ends_with_its_code(tmp_path: Path, launcher: Launcher) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    job = run(tmp_path, command=command(launcher, script))
    assert job.code == 0, job.text
    assert job.text.count("child 3 2.0") == 2


def test_a_child_does_not_wait_for_the_timer_of_stacks() -> None:
    timer = StacksTimer()
    timer.wind_up()
    # What the interpreter does at a child's end; it would wait for a thread that a child does not have.
    assert in_a_child(faulthandler.cancel_dump_traceback_later) == 0
    assert in_a_child(timer.wind_up) == 0
    timer.close()
