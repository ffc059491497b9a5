"""Row 44 of the fault matrix: the order of what happened does not come from anybody's wall clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from allstep.testing import FaultPlan
from tests.faults.rehearsal import BOUND, check_first_lines, rehearse
from tests.jobs.launchers import ROOT

pytestmark = pytest.mark.slow

SHIFTED = """
import os, time
if os.environ.get("RANK") == os.environ["SHIFTED_RANK"]:
    print("the clock is shifted", flush=True)
    real, shift = time.time, float(os.environ["SHIFT"])
    time.time = lambda: real() + shift
    time.time_ns = lambda: int((real() + shift) * 1e9)
"""


@pytest.mark.parametrize("shift", ["-86400", "86400"])
def test_row_44_the_first_to_fail_is_the_cause_whatever_the_clocks_say(tmp_path: Path, shift: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(SHIFTED)
    later = FaultPlan.at(1, 7).sleep(0.1) + FaultPlan.at(1, 7).raise_(KeyError("second"))
    fault = FaultPlan.at(0, 7).raise_(ValueError("first")) + later
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}", "SHIFTED_RANK": "1", "SHIFT": shift}
    options = ["--no-shared-imports"]  # a process of its own from the start, as on a machine of its own
    job = rehearse(tmp_path, "train.py", fault=fault, env=env, options=options, within=BOUND)
    assert job.code == 1
    check_first_lines(job, "rank 0 of 2 failed first", "ValueError: first")
    assert job.cause["rank"] == 0
    assert "[1] the clock is shifted" in job.text
    assert [(each["rank"], each["kind"]) for each in job.report["others"]] == [(1, "error")]
