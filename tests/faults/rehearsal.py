"""Scripts of `scripts/` that meet a fault, given to `allstep run` as --fault and to other launchers in ALLSTEP_FAULT.

Contract: `rehearse` runs one to its end and gives what came of it. Times are fixed, and below what they exclude: a
promise of a few seconds holds for the fastest of `TRIES` jobs, because the machine of a test has other things to do,
and none of them may take as long as `NEVER`, which is below any wait of torch's (30 s and more).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from allstep.testing import FaultPlan
from tests.jobs.forked import Script, run_forked
from tests.jobs.job import Job
from tests.jobs.launchers import Launcher, command
from tests.jobs.running import Running, start

SCRIPTS = Path(__file__).with_name("scripts")
STRIKES = "allstep: a rehearsed fault strikes"

BOUND = 5.0
"""Seconds from a fault to the end of the whole job, unless a row of the matrix says otherwise."""

NEVER = 25.0
TRIES = 3

_CALM = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def rehearsal(
    folder: Path,
    script: str,
    *arguments: str,
    fault: FaultPlan | None = None,
    nproc: int = 2,
    options: Sequence[str] = (),
    launcher: Launcher = "allstep",
    env: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Start a script as a job; `options` are the launcher's own."""
    variables = _CALM | dict(env or {})
    given = list(options)
    if launcher == "allstep" and "--name" not in given:
        given += ["--name", "job"]
    if fault is not None and launcher == "allstep":
        given += ["--fault", fault.to_text()]
    elif fault is not None:
        variables |= fault.to_environ()
    argv = command(launcher, SCRIPTS / script, arguments, nproc=nproc, options=given)
    with start(folder, argv, env=variables) as running:
        yield running


def rehearse(
    folder: Path, script: str, *arguments: str, within: float | None = None, since: str = STRIKES, **options: Any
) -> Job:
    """Run a script to its end; arguments as of `rehearsal`.

    Args:
        within: seconds from the first line with `since` to the end of the job; twice that under torchrun, which takes
            its own time to end.
    """
    if within is not None and options.get("launcher") == "torchrun":
        within *= 2

    def once(own: Path) -> tuple[float, Job]:
        with rehearsal(own, script, *arguments, **options) as running:
            job = running.end()
        return (job.since(since) if within is not None else 0.0), job

    return fastest(folder, once, within if within is not None else NEVER)


def fastest(folder: Path, once: Callable[[Path], tuple[float, Job]], within: float) -> Job:
    """Do `once`, which gives seconds and a job, in new folders until it took less than `within`, `TRIES` times."""
    took: list[float] = []
    while not took or took[-1] >= within:
        own = folder / f"try_{len(took)}"
        own.mkdir()
        seconds, job = once(own)
        took.append(seconds)
        assert seconds < NEVER, f"it took {seconds:.1f} s; the job said:\n{job.text}"
        assert len(took) < TRIES or min(took) < within, (
            f"{TRIES} jobs took {took} s, of {within} s; the last:\n{job.text}"
        )
    return job


def by_hand(folder: Path, script: str, *places: Mapping[str, str]) -> list[Job]:
    """Run one process of a script per place, without a launcher, to their ends."""
    return run_forked(folder, *(Script(SCRIPTS / script, variables=each) for each in places), env=_CALM)


def check_first_lines(job: Job, *words: str, within: int = 12) -> None:
    """The words are in the report's first lines, in this order."""
    first = "\n".join(job.block[:within])
    at = 0
    for word in words:
        found = first.find(word, at)
        assert found >= 0, f"{word!r} does not follow in the first lines of the report:\n{first}\n\nall:\n{job.text}"
        at = found
