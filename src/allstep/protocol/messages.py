"""What crosses the control channel: frozen dataclasses, each one line of JSON with a version.

Who says what:
- rank to service: `Hello` first, with the run's nonce; then `Beat` once a second, `Failure` when an exception is first
  seen, `Stacks` when asked, and `Bye` before it closes.
- service to rank: `Welcome` when all ranks are there and fit, or `Refused`; then `AskStacks`, `Notice` and `Leave`.
- relay to head: `NodeHello` first; then the lines of its ranks as they are, besides `WorkerEnded`, `RankLost` and
  `NodeBeat`. Head to relay: what it would tell the ranks, `NodeBeat`, and `Finish` when the attempt is over.

`codec` has how they are written, read and checked.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field

from allstep.protocol.codec import Codec
from allstep.protocol.registration import Registration
from allstep.protocol.worker_exit import WorkerExit

VERSION = 1

SECTIONS = ("startup", "data", "step", "evaluation", "checkpoint", "handler", "idle")
"""Where a rank can be; see `RankActivity`."""


@dataclass(frozen=True, slots=True)
class Hello:
    """A rank introduces itself. `patience` is how many seconds it gives the others to arrive."""

    nonce: str
    attempt: int
    arrival: Registration
    stacks_file: str = ""
    patience: float = 600.0


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank is.

    `seconds` is the age of its last progress, `waiting` what it waits for its peers in (empty where it does not),
    `engine` the name of the engine that runs, `longest` the longest stay in each section so far in seconds, and
    `own_step` the median seconds of a step without waiting, over the recent steps (0 before there are enough).
    """

    rank: int
    attempt: int
    number: int
    epoch: int
    iteration: int
    section: str
    seconds: float
    waiting: str = ""
    engine: str = ""
    longest: Mapping[str, float] = field(default_factory=dict)
    own_step: float = 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception on its way out of a rank.

    `kind` is its qualified name, `traceback` the text that Python would print, and `derived` says that it is about
    another rank's end: a collective or a connection that broke. `leaving` says that it leaves the World or the script;
    otherwise it left a run, and the script may still catch it.
    """

    rank: int
    attempt: int
    number: int
    kind: str
    message: str
    traceback: str
    epoch: int = 0
    iteration: int = 0
    section: str = ""
    derived: bool = False
    device: str = ""
    leaving: bool = True


@dataclass(frozen=True, slots=True)
class Stacks:
    """The Python stacks of all of a rank's threads, and torch's record of its collectives where there is one."""

    rank: int
    text: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Bye:
    """A rank closed its World, in order, or (`closed` false) its interpreter ends with the World open."""

    rank: int
    closed: bool = True


@dataclass(frozen=True, slots=True)
class Withdraw:
    """A rank goes on after failures that were not leaving: they were caught."""

    rank: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """All ranks are there and fit."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The rank, or the whole world, cannot be taken; `stranger` where it is another run that was found here."""

    reason: str
    stranger: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """End the process now with `code`, after writing `report` (if any) to standard error.

    Without a code the process only writes, and knows that its failure was judged. A relay gives its `spared` ranks no
    code, and the report to `printer` alone (-1: to nobody).
    """

    reason: str
    code: int | None
    report: str = ""
    printer: int = -1
    spared: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Notice:
    """Write a line to standard error. A relay gives it to `printer`."""

    text: str
    printer: int = -1


@dataclass(frozen=True, slots=True)
class AskStacks:
    """Answer with `Stacks`."""


@dataclass(frozen=True, slots=True)
class NodeHello:
    """A relay introduces itself and the ranks that it stands for."""

    nonce: str
    attempt: int
    node_rank: int
    host: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NodeBeat:
    """The other end of a relay's connection is alive."""


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """A worker of this node ended."""

    end: WorkerExit


@dataclass(frozen=True, slots=True)
class RankLost:
    """The connection of a rank closed without `Bye`."""

    rank: int
    why: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The attempt is over; `text` and `code` as in `events.Finished`."""

    text: str
    code: int


Message = (
    Hello
    | Beat
    | Failure
    | Stacks
    | Bye
    | Withdraw
    | Welcome
    | Refused
    | Leave
    | Notice
    | AskStacks
    | NodeHello
    | NodeBeat
    | WorkerEnded
    | RankLost
    | Finish
)

CODEC = Codec("the control channel", VERSION, typing.get_args(Message))
"""How they are written."""


def encode(message: Message) -> bytes:
    """A message as one line, its end included."""
    return CODEC.encode(message)


def decode(line: bytes) -> Message:
    """A message from a line.

    Raises:
        ChannelError: it is not a message of this version.
    """
    message: Message = CODEC.decode(line)
    return message
