"""Every message that crosses a socket of this package: frozen dataclasses, each one line of JSON with a version.

Who sends what:

- A rank to its monitor: `RankHello` first. Then `Heartbeat` once a second, `Failure` when an
  exception is first seen and `FailureCaught` when that was caught, `CheckpointSaved` from rank 0, `Stacks` when asked,
  and `Goodbye` before it closes.
- The monitor to a rank: `Welcome` when all ranks have come and fit, or `Refused`. Then `AskStacks`, `Notice`, `Leave`.
- A relay to the head's hub: `NodeHello` first. Then the lines of its ranks as they are, and `RankEnding`,
  `WorkerEnded`, `RankLost`, `ProcessSeen`, `NodeRemark` and `NodeHeartbeat`. The hub to a relay: what it would tell the
  ranks, `RankEnding`, `NodeHeartbeat`, and `Finish` at the end.
- Between the two, where a preflight was asked for, what `preflight_messages` has.
- A machine that joins a run, to node 0: `JoinRequest` before each attempt, or `NodeResigned`. Node 0 answers
  `JoinPending` every few seconds, then `AttemptStart`, `RunOver` or `Refused`.

Before any of them, both sides have proved to each other that they have the run's key (`authentication`). `codec` has
how they are written, read and checked.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field

from allstep.protocol.codec import Codec
from allstep.protocol.preflight_messages import (
    DeviceSums,
    LinkMeasured,
    LinkProbe,
    NodeFinding,
    PreflightOrder,
    StepDone,
)
from allstep.protocol.registration import RankRegistration
from allstep.protocol.worker_exit import WorkerExit

VERSION = 9
"""Both sides of a connection must have the same: all ranks and machines of a run install the same allstep."""

SECTIONS = ("startup", "data", "step", "evaluation", "checkpoint", "handler", "idle")
"""Where a rank can be; see `RankActivity`."""


@dataclass(frozen=True, slots=True)
class RankHello:
    """A rank introduces itself. `patience` is how many seconds it gives the others to arrive."""

    attempt: int
    registration: RankRegistration
    stacks_file: str = ""
    patience: float = 600.0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Where a rank is.

    `seconds` is the age of its last progress, `waiting` what it waits for its peers in (empty where it does not),
    `engine` the name of the engine that runs, `longest` the longest stay in each section so far in seconds, and
    `own_step` the median seconds of a step without waiting, over the recent steps (0 before there are enough).
    `left_out` is the last iteration whose forward pass had no backward pass (0: each had one), `most_passes` the most
    backward passes of a module in one iteration. `goal` is how many iterations the run is to have (0: not known).
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
    left_out: int = 0
    most_passes: int = 0
    goal: int = 0


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint was committed: after which iteration it was taken, how long that took, and where it is."""

    rank: int
    step: int
    seconds: float
    address: str


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
    """The Python stacks of all of a rank's threads, and torch's record of its collectives where there is one.

    `trace` has those that are not over, one a line, and `groups` is what `diagnosis.flight_records` compares ranks by.
    """

    rank: int
    text: str
    trace: str = ""
    groups: str = ""


@dataclass(frozen=True, slots=True)
class Goodbye:
    """A rank closed its World, in order, or (`closed` false) its interpreter ends with the World open.

    `code` is the exit status with which it is about to end, where an exception says so, such as 85.
    """

    rank: int
    closed: bool = True
    code: int = 0


@dataclass(frozen=True, slots=True)
class FailureCaught:
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
    code, and the report to `printer` alone. With a report and no printer (-1) the relay's own service writes it.
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

    attempt: int
    node_rank: int
    host: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NodeHeartbeat:
    """The other end of a relay's connection is alive.

    `reporter` is the node whose service writes the report if the head's is gone without one (-1: this is no word of the
    head's).
    """

    reporter: int = -1


@dataclass(frozen=True, slots=True)
class RankEnding:
    """How a rank of the sender's node ends: sent before anything else, since a scheduler may end the sender next.

    `registration` and the place are what the sender knew of it.
    """

    end: WorkerExit
    registration: RankRegistration
    epoch: int = 0
    iteration: int = 0
    section: str = ""


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """A worker of this node ended."""

    end: WorkerExit


@dataclass(frozen=True, slots=True)
class RankLost:
    """The connection of a rank closed without `Goodbye`."""

    rank: int
    why: str


@dataclass(frozen=True, slots=True)
class ProcessSeen:
    """What the process of a rank that sends no heartbeat does: a `ProcessActivity`'s text."""

    rank: int
    activity: str


@dataclass(frozen=True, slots=True)
class NodeRemark:
    """What the node of a rank that has just failed knows of the reason, such as that memory ran out."""

    rank: int
    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The attempt is over.

    `text` is the last word about the run, or empty where it goes on with another attempt; `code` is the exit status, of
    the run or, without a supervisor, of the ranks.
    """

    text: str
    code: int


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """A machine wants to take part in a run. `facts` are settings that must be the same on all machines, as text."""

    nodes: int
    node_rank: int
    workers: int
    host: str
    pid: int
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def process(self) -> str:
        """Which process it is, for comparing and for errors."""
        return f"pid {self.pid} on {self.host}"


@dataclass(frozen=True, slots=True)
class JoinPending:
    """Node 0 is there and waits for other machines."""


@dataclass(frozen=True, slots=True)
class AttemptStart:
    """An attempt begins: its names, the ports of its services on node 0, and which ranks are this machine's.

    The attempt's key is derived from the run's and `salt`, on each machine by itself. `node_rank` and `nodes` are its
    place among those that take part; -1 and 0 mean as it said itself.
    """

    run_id: str
    attempt: int
    salt: str
    channel_port: int
    master_port: int
    first_rank: int
    world_size: int
    max_restarts: int
    node_rank: int = -1
    nodes: int = 0


@dataclass(frozen=True, slots=True)
class RunOver:
    """The run has ended with this exit status; `text` is one line for this machine's terminal."""

    status: int
    text: str


@dataclass(frozen=True, slots=True)
class NodeResigned:
    """A machine of the run will not come again, for this reason."""

    node_rank: int
    reason: str


# A line is decoded by the name of its class, so classes here are not renamed without a new VERSION.
Message = (
    RankHello
    | Heartbeat
    | CheckpointSaved
    | Failure
    | Stacks
    | Goodbye
    | FailureCaught
    | Welcome
    | Refused
    | Leave
    | Notice
    | AskStacks
    | NodeHello
    | NodeHeartbeat
    | RankEnding
    | WorkerEnded
    | RankLost
    | ProcessSeen
    | NodeRemark
    | Finish
    | JoinRequest
    | JoinPending
    | AttemptStart
    | RunOver
    | NodeResigned
    | PreflightOrder
    | NodeFinding
    | DeviceSums
    | LinkMeasured
    | StepDone
    | LinkProbe
)

_CODEC = Codec("the control channel", VERSION, typing.get_args(Message))


def encode(message: Message) -> bytes:
    """A message as one line, its end included."""
    return _CODEC.encode(message)


def decode(line: bytes) -> Message:
    """A message from a line.

    Raises:
        ChannelError: it is not a message of this version.
    """
    message: Message = _CODEC.decode(line)
    return message
