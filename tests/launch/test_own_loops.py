"""The watch of scripts that train in a loop of their own, without an Engine, with real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.jobs.launchers import script
from tests.jobs.running import run

pytestmark = pytest.mark.slow

LIMIT_S = 6

OPEN = """
import time
import torch
import allstep

with allstep.init() as world:
    until = time.monotonic() + 9
"""
COLLECTIVES = """
    while world.all_reduce(float(time.monotonic() < until)) == 2:
        time.sleep(0.1)  # the work of the loop
"""
GRADIENTS = """
    model = world.wrap(torch.nn.Linear(2, 2))
    for _ in range(90):
        time.sleep(0.1)  # the work of the step
        model(torch.ones(1, 2)).sum().backward()
"""
MAIN_FIRST = """
    with world.main_first():
        if world.is_main:
            time.sleep(9)  # longer than the limit
"""
ONE_STAYS_AWAY = """
    world.all_reduce(1.0)
    if rank == 1:
        time.sleep(600)  # the hang itself
    world.all_reduce(2.0)
"""


@pytest.mark.nightly
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(COLLECTIVES, id="collectives"),
        pytest.param(GRADIENTS, id="gradients"),
        pytest.param(MAIN_FIRST, id="main_first"),
    ],
)
def test_ranks_that_meet_or_take_turns_do_not_hang_however_long_it_takes(body: str, tmp_path: Path) -> None:
    script(tmp_path, OPEN + body)
    result = run(tmp_path, "--nproc", "2", "--limits", f"startup={LIMIT_S}", "script.py")
    assert result.code == 0, result.err


def test_a_rank_that_does_not_come_to_the_next_meeting_is_named(tmp_path: Path) -> None:
    script(tmp_path, OPEN + ONE_STAYS_AWAY)
    result = run(tmp_path, "--nproc", "2", "--name", "exp", "--limits", f"startup={LIMIT_S}", "script.py")
    assert result.code == 83, result.err
    cause = json.loads((tmp_path / "runs/exp/attempt_0/failure.json").read_text())["cause"]
    assert (cause["rank"], cause["kind"]) == (1, "hang")
    assert "rank 0 waits in all_reduce #2 at script.py" in result.err
