"""`rehearse`: what `allstep rehearse` does, in a test.

Contract: called from a test, in any thread. Everything runs in processes of its own, which are gone when the call
returns. It raises where a job of this script would not go on as if nothing had happened.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from allstep.errors import RehearsalError
from allstep.rehearsal.interruption import Kind
from allstep.rehearsal.rehearsal_report import RehearsalReport
from allstep.rehearsal.rehearsal_request import RehearsalRequest


def rehearse(kind: Kind, script: str | os.PathLike[str], *arguments: str, **options: Any) -> RehearsalReport:
    """Interrupt a script as a cluster would, let it go on, and compare it with an unbroken run.

    Args:
        kind: "preemption", "requeue", "failure" or "time-limit".
        script: its path; with `module=True` a module's name.
        arguments: its own.
        options: those of `allstep rehearse`, with underscores: `ranks`, `then_ranks`, `iterations`, `at`, `rank`,
            `lead`, `kill_wait` and `timeout` in seconds, `device`, `mesh`, `env`, `runs` (a folder, "runs" by default),
            `workdir`, `keep`.

    Returns:
        What came of it, where that is good: `report.verdict` is "exact", or "close" at another number of ranks.

    Raises:
        RehearsalError: it is not; the message is the report, and `error.report` has it as a value.
        ConfigurationError: an option is out of range.
        LaunchError: the script is not there.
    """
    __tracebackhide__ = True
    for name in ("runs", "workdir"):
        if options.get(name) is not None:
            options[name] = Path(options[name])
    request = RehearsalRequest(kind=kind, target=os.fspath(script), arguments=arguments, **options)
    from allstep.rehearsal.rehearsing import rehearse as run  # loads torch

    report = run(request)
    if not report.is_good:
        raise RehearsalError(str(report), report)
    return report
