"""What SLURM says of jobs, in one question to its queue and one to its accounting, each bounded in time.

Contract: `ask_jobs` never raises and takes at most twice `within`. It gives what SLURM knows, by the job's number as
SLURM's commands take it (4711, or 4711_3 for an array's member), and where SLURM did not answer, why: there is no SLURM
here, or its controller is away. A job that has ended is in the queue for some minutes (`MinJobAge`), and then in the
accounting, where a cluster has one. `read_queue` and `read_accounting` are pure.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from allstep.errors import printable
from allstep.submission.slurm_commands import is_no_answer, run_command

ANSWER_S = 5.0

_QUEUE = "%i|%T|%r|%e|%N"
_ACCOUNTING = "JobID,State,End,NodeList"


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as SLURM has it.

    Attributes:
        job: its number.
        state: one of SLURM's own, such as PENDING, RUNNING, COMPLETED, CANCELLED, TIMEOUT or NODE_FAIL.
        reason: why it waits, or ended; empty where SLURM says none.
        ends: when its time is up, in seconds since 1970; None where it has no end or has not begun.
        nodes: as SLURM writes it, such as node[01-04]; empty while it has none.
    """

    job: str
    state: str
    reason: str = ""
    ends: float | None = None
    nodes: str = ""


@dataclass(frozen=True, slots=True)
class JobStates:
    """An answer: the jobs that SLURM knows, and why it gave none where it did not answer."""

    jobs: Mapping[str, JobState] = field(default_factory=dict)
    problem: str = ""

    def members(self, array: str) -> list[JobState]:
        """The members of an array, in order."""
        found = [each for each in self.jobs.values() if each.job.startswith(f"{array}_")]
        return sorted(found, key=lambda each: (len(each.job), each.job))


def ask_jobs(jobs: Sequence[str], within: float = ANSWER_S) -> JobStates:
    """What SLURM knows of these jobs.

    Args:
        jobs: their numbers; an array's stands for all of its members.
        within: seconds that each of SLURM's commands has to answer.
    """
    if not jobs:
        return JobStates()
    named = ",".join(dict.fromkeys(jobs))
    said, problem = _ask(
        ["squeue", "--noheader", "--array", "--states=all", f"--jobs={named}", f"--format={_QUEUE}"], within
    )
    if problem:
        return JobStates(problem=problem)
    found = {each.job: each for each in read_queue(said)}
    missing = [job for job in jobs if job not in found and not any(name.startswith(f"{job}_") for name in found)]
    if missing:
        command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(missing)}"]
        # No accounting, or none that answers: the queue's answer stands.
        said, _ = _ask([*command, f"--format={_ACCOUNTING}"], within)
        found = {each.job: each for each in read_accounting(said)} | found
    return JobStates(found)


def read_queue(text: str) -> list[JobState]:
    """The lines that squeue printed."""
    rows = [line.split("|", 4) for line in text.splitlines()]
    return [
        JobState(job.strip(), state, "" if reason == "None" else reason, _time(ends), nodes.strip())
        for job, state, reason, ends, nodes in (row for row in rows if len(row) == 5)
    ]


def read_accounting(text: str) -> list[JobState]:
    """The lines that sacct printed; of a job that was requeued the last one counts."""
    rows = [line.split("|", 3) for line in text.splitlines()]
    found = {}
    for job, state, ends, nodes in (row for row in rows if len(row) == 4):
        word, _, rest = state.partition(" ")  # "CANCELLED by 1000"
        found[job] = JobState(job, word, rest, _time(ends), "" if nodes.startswith("None") else nodes.strip())
    return list(found.values())


def _ask(command: Sequence[str], within: float) -> tuple[str, str]:
    """What a command of SLURM's printed, and why it did not answer."""
    name = command[0]
    try:
        done = run_command(command, within=within)
    except FileNotFoundError:
        return "", f"there is no {name} here"
    except subprocess.TimeoutExpired:
        return "", f"{name} did not answer within {within:g} s"
    except OSError as error:
        return "", f"{name} cannot be run: {error}"
    if done.returncode == 0:
        return done.stdout, ""
    said = printable(" ".join(done.stderr.split())) or f"exit code {done.returncode}"
    if "invalid job id" in said.lower():  # it knows none of them any more, which is an answer
        return "", ""
    return "", f"SLURM's controller does not answer: {said}" if is_no_answer(said) else f"{name}: {said}"


def _time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:  # "N/A", "Unknown"
        return None
