"""What a hub or relay tells its driver has happened."""

from __future__ import annotations

from dataclasses import dataclass

from allstep.channel.causes import Case


@dataclass(frozen=True, slots=True)
class AllArrived:
    """All ranks are there and fit; they were told to go on."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The run has failed, and it is clear how. The driver orders the ranks to leave."""

    case: Case


@dataclass(frozen=True, slots=True)
class StragglerSeen:
    """A rank takes `ratio` times the others' time for its own part of a step."""

    rank: int
    ratio: float


@dataclass(frozen=True, slots=True)
class AllEnded:
    """The end of every worker is known. A verdict, if there is one, came before."""


@dataclass(frozen=True, slots=True)
class Ordered:
    """At a relay: the head ordered the ranks to leave, and they were told; the driver kills those that do not.

    `spared` are ranks of any node that are on their way out with an exception of their own.
    """

    reason: str
    code: int
    spared: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """At a relay: the attempt is over. `text` is the last word about the run, or empty where it goes on with another
    attempt; `code` is the exit status, of the run or, without a supervisor, of the ranks.
    """

    text: str
    code: int


HubEvent = AllArrived | Verdict | StragglerSeen | AllEnded | Ordered | Finished
"""Any of them."""
