"""SLURM's commands by which jobs are submitted, requeued and cancelled, each bounded in time.

Contract: failures are in SLURM's own words. `submit` gives a job to SLURM and returns its number, or raises a
SubmissionError with the remedy. Where SLURM does not answer, `ask_state` and `ask_end` return None and `jobs_of` no
jobs. `requeue` and `submit_next` are tried again while the controller does not answer, for as long as a restart of it
takes; `cancel` and `give_notice` are not.
"""

from __future__ import annotations

import getpass
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from allstep.errors import SubmissionError, printable
from allstep.placement.slurm import job_of_process, requeue_command

_ANSWER_S = 30.0
PATIENCE_S = 60.0
"""Seconds for which a controller that does not answer is asked again."""

_NO_ANSWER = (
    "unable to contact slurm controller",
    "socket timed out",
    "connection refused",
    "zero bytes were",
    "expired",
)


def submit(script: Path, options: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> str:
    """Give a batch script to SLURM and return the job's number.

    sbatch hears nothing of the job or step that this process may itself be in, nor of options in variables, which would
    win over the script.

    Raises:
        SubmissionError: there is no sbatch, the controller does not answer, or it refuses the job.
    """
    given = os.environ if environ is None else environ
    outside = {name: value for name, value in given.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    outside |= {name: given[name] for name in ("SLURM_CONF",) if name in given}
    try:
        done = run_command(["sbatch", "--parsable", *options, str(script)], outside)
    except FileNotFoundError:
        raise SubmissionError(
            "there is no sbatch here; run allstep submit on a login node of the cluster, or load its SLURM module; "
            "--dry-run shows the script anywhere"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SubmissionError(f"sbatch did not answer: {error}; see whether `scontrol ping` does") from error
    if done.returncode:
        said = printable(" ".join(done.stderr.split())) or f"exit code {done.returncode}"
        if is_no_answer(said):
            raise SubmissionError(f"SLURM's controller does not answer: {said}; see `scontrol ping`, and submit again")
        raise SubmissionError(f"SLURM refused the job: {said}")
    # "4711", or "4711;cluster" where there are several clusters.
    return done.stdout.strip().splitlines()[-1].partition(";")[0]


def requeue(environ: Mapping[str, str]) -> str | None:
    """Put this process's job back into its queue; None, or why not."""
    command = requeue_command(environ)
    if command is None:
        return "this is no SLURM job"
    return _patiently(lambda: _failure(command))


def submit_next(script: Path, environ: Mapping[str, str]) -> tuple[str | None, str]:
    """Submit a script to begin when this process's job has ended; its number and "", or None and why not."""
    options = [f"--dependency=afterany:{job_of_process(environ) or ''}"]
    if task := environ.get("SLURM_ARRAY_TASK_ID"):
        options.append(f"--array={task}")
    numbers: list[str] = []

    def attempt() -> str | None:
        try:
            numbers.append(submit(script, options, environ))
        except SubmissionError as error:
            return str(error)
        return None

    failure = _patiently(attempt)
    return (numbers[0], "") if failure is None else (None, failure)


def jobs_of(script: Path, name: str) -> list[str]:
    """The numbers of jobs in the queue that were submitted with this script; none where nobody answers.

    Args:
        script: the batch script.
        name: of those jobs.
    """
    said = _answer(["squeue", "--noheader", f"--user={getpass.getuser()}", f"--name={name}", "--format=%i %o"])
    found = [line.strip().partition(" ") for line in (said or "").splitlines()]
    return [number for number, _, command in found if command == str(script)]


def cancel(job: str) -> str | None:
    """End a job, or take it out of its queue; None, or why not."""
    return _failure(["scancel", job])


def give_notice(job: str, *, batch: bool) -> str | None:
    """Send SIGUSR1 to a job that runs; None, or why not.

    Args:
        job: its number.
        batch: to the process that its batch script is, as under `allstep submit`; else to the tasks of its steps.
    """
    return _failure(["scancel", "--signal=USR1", *(["--batch"] if batch else []), job])


def ask_state(job: str) -> str | None:
    """A job's state, such as RUNNING; None where nobody answers."""
    said = _answer(["squeue", "--noheader", f"--jobs={job}", "--format=%T"])
    return said.splitlines()[0].strip() if said else None


def ask_end(job: str) -> float | None:
    """When a job's time is up, in seconds since 1970; None where it has no end or nobody answers."""
    said = _answer(["squeue", "--noheader", f"--jobs={job}", "--format=%e"])
    try:
        return datetime.fromisoformat(said.strip()).timestamp() if said else None
    except ValueError:  # "N/A": a job without a limit
        return None


def _patiently(attempt: Callable[[], str | None]) -> str | None:
    until = time.monotonic() + PATIENCE_S
    while True:
        failure = attempt()
        if failure is None or not is_no_answer(failure) or time.monotonic() > until:
            return failure
        time.sleep(1.0)  # nothing tells that a controller is back


def _failure(command: Sequence[str]) -> str | None:
    try:
        done = run_command(command)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else None


def _answer(command: Sequence[str]) -> str | None:
    try:
        done = run_command(command)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def is_no_answer(said: str) -> bool:
    """Whether words of SLURM's say that its controller is away, rather than that it refuses."""
    return any(each in said.lower() for each in _NO_ANSWER)


def run_command(
    command: Sequence[str], environ: Mapping[str, str] | None = None, *, within: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM's; raises OSError where there is none, and TimeoutExpired after `within` seconds."""
    return subprocess.run(
        command,
        env=dict(os.environ if environ is None else environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_ANSWER_S if within is None else within,
        check=False,
    )
