"""What a cluster does to a job and how it starts it again: which signals when, and with which variables. Pure.

Contract: `signals_of` gives what is sent from the moment at which the run stands after a given iteration.

| kind | what is sent | how the job comes back |
| --- | --- | --- |
| preemption | the notice, SIGUSR1; at the end of its lead time SIGTERM, then SIGKILL | as it was started |
| requeue | the same, as `allstep submit` gives it | the same SLURM job with the next SLURM_RESTART_COUNT |
| time-limit | SIGTERM, then SIGKILL: the limit came without a notice | a new SLURM job |
| failure | SIGKILL to one rank | a restart by `allstep run --max-restarts 1` |

SIGUSR1 goes to `allstep run`, as srun passes it on to its tasks. SIGTERM and SIGKILL go to each process of the step,
as SLURM's own at a job's end do. KillWait is the time between these two.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["preemption", "requeue", "failure", "time-limit"]
KINDS: tuple[Kind, ...] = get_args(Kind)

KILL_WAIT_S = 30.0
"""SLURM's default for KillWait."""

_JOB = 1000


@dataclass(frozen=True, slots=True)
class SentSignal:
    """One signal.

    Args:
        after: seconds since the run stood at its place.
        number: which.
        to: "launcher" for `allstep run`, "all" for it and its ranks, or a rank.
    """

    after: float
    number: signal.Signals
    to: int | Literal["launcher", "all"]


def signals_of(kind: Kind, *, lead: float, kill_wait: float, rank: int) -> tuple[SentSignal, ...]:
    """What is sent, in order.

    Args:
        kind: see above.
        lead: seconds from the notice to the end.
        kill_wait: seconds from SIGTERM to SIGKILL.
        rank: which one fails.
    """
    if kind == "failure":
        return (SentSignal(0.0, signal.SIGKILL, rank),)
    begins = 0.0 if kind == "time-limit" else lead
    end = (SentSignal(begins, signal.SIGTERM, "all"), SentSignal(begins + kill_wait, signal.SIGKILL, "all"))
    return end if kind == "time-limit" else (SentSignal(0.0, signal.SIGUSR1, "launcher"), *end)


def job_variables(kind: Kind, start: int) -> dict[str, str]:
    """What SLURM sets for a start of the job, from 0; nothing outside of SLURM."""
    if kind == "requeue":
        count = {"SLURM_RESTART_COUNT": str(start)} if start else {}
        return {"SLURM_JOB_ID": str(_JOB), "SLURM_JOB_NUM_NODES": "1", **count}
    if kind == "time-limit":
        return {"SLURM_JOB_ID": str(_JOB + start), "SLURM_JOB_NUM_NODES": "1"}
    return {}


def measures_saves(kind: Kind) -> bool:
    """Whether the job saves once at its beginning, so that the notice's lead is known."""
    return kind in ("preemption", "requeue")


def is_restarted_inside(kind: Kind, *, other_size: bool) -> bool:
    """Whether `allstep run` itself starts the ranks again; at another size that takes another `allstep run`."""
    return kind == "failure" and not other_size
