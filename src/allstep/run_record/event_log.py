"""The event log of a run: lines of JSON, added to `events.jsonl` as things happen, and an older file before it.

Contract: one process at a time adds (`EventLog.add`); any number read (`read_events`), also while it adds. Each event
has a number `n`, which goes up by one, the `time` in seconds since 1970, and its `kind`. A line that a kill or a full
disk cut is left out by readers, and the next writer goes on behind it.

The log is bounded. When `events.jsonl` has reached its limit, it and the older file become one file of at most half of
that: lines that come again and again (`PERIODIC`) are thinned out, every second one first, so that a long run is told
in less detail the longer ago it was. A reader that comes in between sees no event twice, since it goes by the numbers.

What can go wrong: the folder cannot be written, which is an OSError of `add` for the caller to weigh.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from allstep.protocol.private_files import append_line, read_lines, write_whole

FILE = "events.jsonl"
OLDER = "events.older.jsonl"

LIMIT = 1 << 20
"""Bytes of `events.jsonl`."""

PERIODIC = frozenset({"progress", "save"})
"""Kinds of which a later event makes an earlier one worth less."""

Event = dict[str, Any]


class EventLog:
    """The log of one run, for its writer.

    Args:
        folder: the run's.
        limit: see `LIMIT`.
        clock: seconds since 1970.
    """

    def __init__(self, folder: Path, *, limit: int = LIMIT, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._limit = limit
        self._clock = clock
        self._next = 1 + max((event["n"] for event in read_events(folder)), default=-1)

    def add(self, kind: str, **fields: Any) -> None:
        """Add an event; raises OSError."""
        event = {"n": self._next, "time": round(self._clock(), 3), "kind": kind, **fields}
        self._next += 1
        if append_line(self._folder / FILE, event) >= self._limit:
            self._thin_out()

    def _thin_out(self) -> None:
        events = thinned(read_events(self._folder), self._limit // 2)
        # The older file first: what is in both is read once.
        write_whole(self._folder / OLDER, b"".join(map(_line, events)))
        write_whole(self._folder / FILE, b"")


def read_events(folder: Path) -> list[Event]:
    """All events of a run, oldest first; none where there is no log."""
    # The newer file first: an event that moves to the older one in between is found there.
    newer = _events(folder / FILE)
    older = _events(folder / OLDER)
    last = max((event["n"] for event in older), default=-1)
    return older + [event for event in newer if event["n"] > last]


def thinned(events: Sequence[Event], size: int) -> list[Event]:
    """The events of a log in at most so many bytes: those of `PERIODIC` thinned out, then the oldest left out.

    The last event of each periodic kind stays as long as anything of its kind does.
    """
    kept = list(events)
    while sum(len(_line(event)) for event in kept) > size:
        periodic = [event for event in kept if event["kind"] in PERIODIC]
        last = {event["kind"]: event["n"] for event in periodic}
        # By turns within each kind, from the second: the first one of an attempt says when it got going.
        dropped = {
            event["n"]
            for kind in PERIODIC
            for event in [each for each in periodic if each["kind"] == kind][1::2]
            if event["n"] != last[kind]
        }
        thinner = [event for event in kept if event["n"] not in dropped]
        kept = thinner if dropped else kept[len(kept) // 2 + 1 :]
    return kept


def _events(path: Path) -> list[Event]:
    return [
        event
        for event in read_lines(path)
        if isinstance(event.get("n"), int)
        and isinstance(event.get("time"), int | float)
        and isinstance(event.get("kind"), str)
    ]


def _line(event: Event) -> bytes:
    return json.dumps(event).encode() + b"\n"
