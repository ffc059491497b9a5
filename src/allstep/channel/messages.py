"""What crosses the control channel: frozen dataclasses, each one line of JSON with a version.

Who says what:
- rank to service: `Hello` first, with the run's nonce; then `Beat` once a second, `Failure` when an exception is first
  seen, `Stacks` when asked, and `Bye` before it closes.
- service to rank: `Welcome` when all ranks are there and fit, or `Refused`; then `AskStacks`, `Notice` and `Leave`.
- relay to head: `NodeHello` first; then the lines of its ranks as they are, besides `WorkerEnded`, `RankLost` and
  `NodeBeat`. Head to relay: what it would tell the ranks, `NodeBeat`, and `Finish` when the attempt is over.

`decode` checks that a message has its fields and that each has its type, so nobody behind it has to. What can go
wrong: `ChannelError` for a line that is not a message of this version.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from allstep.channel.arrival import Arrival
from allstep.channel.ending import WorkerEnd
from allstep.errors import ChannelError

VERSION = 1

SECTIONS = ("startup", "data", "step", "evaluation", "checkpoint", "handler", "idle")
"""Where a rank can be; see `Pulse`."""


@dataclass(frozen=True, slots=True)
class Hello:
    """A rank introduces itself. `patience` is how many seconds it gives the others to arrive."""

    nonce: str
    attempt: int
    arrival: Arrival
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
    another rank's end: a collective or a connection that broke.
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


@dataclass(frozen=True, slots=True)
class Stacks:
    """The Python stacks of all of a rank's threads, and torch's record of its collectives where there is one."""

    rank: int
    text: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Bye:
    """A rank closed its World, in order."""

    rank: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """All ranks are there and fit."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The rank, or the whole world, cannot be taken."""

    reason: str


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

    end: WorkerEnd


@dataclass(frozen=True, slots=True)
class RankLost:
    """The connection of a rank closed without `Bye`."""

    rank: int
    why: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The attempt is over; `text` is the report, `code` the run's exit status."""

    text: str
    code: int


Message = (
    Hello
    | Beat
    | Failure
    | Stacks
    | Bye
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

_TYPES: dict[str, type[Any]] = {kind.__name__: kind for kind in typing.get_args(Message)}


def encode(message: Message) -> bytes:
    """A message as one line, its end included."""
    body = {"v": VERSION, "type": type(message).__name__, **asdict(message)}
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """A message from a line.

    Raises:
        ChannelError: it is not JSON, not a message, of another version, or a field is missing or of another type.
    """
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ChannelError(f"not a message of the control channel: {line[:80]!r}") from error
    if not isinstance(body, dict) or "v" not in body:
        raise ChannelError(f"not a message of the control channel: {line[:80]!r}")
    if body["v"] != VERSION:
        raise ChannelError(
            f"a message of version {str(body['v'])[:20]} of the control channel, and this is version {VERSION}; "
            "install the same allstep on all nodes"
        )
    kind = _TYPES.get(str(body.get("type")))
    if kind is None:
        raise ChannelError(f"a message of the unknown type {str(body.get('type'))[:40]!r}")
    message: Message = _build(kind, body)
    return message


_Check = tuple[str, tuple[type, ...], type[Any] | None, type[Any] | None, bool]


def _checks(kind: type[Any]) -> list[_Check]:
    """For each field: name, the JSON types it may have, a dataclass to build from it, its items' type, required."""
    hints = typing.get_type_hints(kind)
    checks: list[_Check] = []
    for each in fields(kind):
        hint = hints[each.name]
        origin = typing.get_origin(hint)
        required = each.default is MISSING and each.default_factory is MISSING
        if hint is float:
            check: _Check = (each.name, (float, int), None, None, required)
        elif origin is tuple:
            check = (each.name, (list,), None, typing.get_args(hint)[0], required)
        elif origin in (Mapping, dict):
            check = (each.name, (dict,), None, typing.get_args(hint)[1], required)
        elif origin in (typing.Union, types.UnionType):
            check = (each.name, typing.get_args(hint), None, None, required)
        elif hint in (Arrival, WorkerEnd):
            check = (each.name, (dict,), hint, None, required)
        else:
            check = (each.name, (hint,), None, None, required)
        checks.append(check)
    return checks


def _is(value: Any, accepted: tuple[type, ...]) -> bool:
    return isinstance(value, accepted) and (value.__class__ is not bool or bool in accepted)


def _build(kind: type[Any], body: Mapping[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for name, accepted, nested, items, required in _CHECKS[kind]:
        if name not in body:
            if required:
                raise ChannelError(f"a {kind.__name__} without {name}")
            continue
        value: Any = body[name]
        if not _is(value, accepted):
            raise ChannelError(f"a {kind.__name__} whose {name} is {str(value)[:40]!r}")
        if nested is not None:
            value = _build(nested, value)
        elif items is not None:
            wanted = (float, int) if items is float else (items,)
            if not all(isinstance(item, wanted) for item in (value.values() if accepted == (dict,) else value)):
                raise ChannelError(f"a {kind.__name__} whose {name} is {str(value)[:40]!r}")
            if accepted == (list,):
                value = tuple(value)
        values[name] = value
    return kind(**values)


_CHECKS: dict[type[Any], list[_Check]] = {kind: _checks(kind) for kind in (*_TYPES.values(), Arrival, WorkerEnd)}
