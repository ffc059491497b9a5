"""Row 23 of the fault matrix where no network can be slowed down: a proxy holds back what ranks and service say."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import pytest

from allstep.launch.environment import ReservedPort, worker_environment
from allstep.monitor.service import StragglerSeen, Verdict
from allstep.testing import FaultPlan
from tests.faults.jitter import jitter
from tests.faults.rehearsal import SCRIPTS
from tests.jobs.running import start
from tests.monitor.driving import KEY, serving

pytestmark = pytest.mark.slow

MOST_LATE = 2.0
"""Seconds; heartbeats come once a second, so they bunch up, and silences are several times as long as without."""


def test_row_23_news_that_comes_late_and_in_bunches_ends_nobody(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        driven = stack.enter_context(serving(2, limits="silence=10", clock=time.monotonic))
        address = stack.enter_context(jitter(driven.port, MOST_LATE))
        store = stack.enter_context(ReservedPort(shared=True))
        running = []
        for rank in range(2):
            variables = worker_environment(
                rank=rank,
                world_size=2,
                local_rank=rank,
                local_world_size=2,
                master_addr="127.0.0.1",
                master_port=store.port,
                run_id="late",
                channel=address,
                key=KEY,
            )
            variables |= FaultPlan.at(1, 2).slow(0.1).to_environ() | {"OMP_NUM_THREADS": "1"}
            argv = [sys.executable, SCRIPTS / "few_steps.py", "80"]
            running.append(stack.enter_context(start(tmp_path, argv, env=variables)))
        driven.until(lambda: all(each.process.poll() is not None for each in running), seconds=80.0)
        jobs = [each.end() for each in running]
    for job in jobs:
        assert job.code == 0, job.text
        assert "trained 80" in job.out
    assert [event.rank for event in driven.events if isinstance(event, StragglerSeen)] == [1]
    assert not any(isinstance(event, Verdict) for event in driven.events)
