"""Where this rank is: written by the thread that trains, read by the thread that beats.

Contract: one `Pulse` per World. The training thread says when it enters a section, begins and ends to wait for its
peers, and has done a step; that is attribute stores and, once per section, one reading of the clock. It takes no lock.
The beating thread calls `beat`, which may see a store of the moment before; nothing depends on more. Any change of
section is progress: `Beat.seconds` counts from there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from allstep.channel.messages import SECTIONS, Beat

RECENT = 20
"""Steps over which a rank's own time is taken."""


class Pulse:
    """The record of one rank. `epoch`, `iteration` and `engine` are plain attributes to be set."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.epoch = 0
        self.iteration = 0
        self.engine = ""
        self.section_name = "startup"
        self.waiting = ""
        self._clock = clock
        self._since = clock()
        self._longest: dict[str, float] = {}
        self._waited_since = 0.0
        self._waited = 0.0
        self._step_began: float | None = None
        self._own = [0.0] * RECENT
        self._steps = 0
        self._runs = 0

    def enter(self, section: str) -> None:
        """Say that the rank is now in `section`, one of `SECTIONS`, or made progress in the one where it is."""
        now = self._clock()
        lasted = now - self._since
        if lasted > self._longest.get(self.section_name, 0.0):
            self._longest[self.section_name] = lasted
        self._since = now
        self.section_name = section

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Be in `name` for the length of a with block, then back where the rank was."""
        before = self.section_name
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def run(self, engine: str) -> Iterator[None]:
        """Be in the run of an engine. An engine that runs inside another gives the outer one its place back."""
        before = (self.engine, self.epoch, self.iteration, self.section_name, self._step_began)
        self.engine, self._step_began = engine, None
        self._runs += 1
        try:
            yield
        finally:
            self._runs -= 1
            self.engine, self.epoch, self.iteration, section, self._step_began = before
            self.enter(section if self._runs else "idle")

    @property
    def nested(self) -> bool:
        """Whether the running engine was started from another one's step or handler."""
        return self._runs > 1

    def wait_began(self, what: str) -> None:
        """Say that the rank waits for its peers from now on, in `what` ("gradients", "all_reduce #3")."""
        self._waited_since = self._clock()
        self.waiting = what

    def wait_ended(self) -> None:
        """Say that the wait is over; the time it took is not the rank's own."""
        self.waiting = ""
        self._waited += self._clock() - self._waited_since

    def step_done(self) -> None:
        """Say that an iteration is complete: the time since the last one, less what was waited, is its own time.

        Only the outermost engine's iterations count; where another engine ran in between, its time is part of them.
        """
        if self._runs > 1:
            return
        now = self._clock()
        if self._step_began is not None:
            self._own[self._steps % RECENT] = now - self._step_began - self._waited
            self._steps += 1
        self._step_began = now
        self._waited = 0.0

    def beat(self, rank: int, attempt: int, number: int) -> Beat:
        """What to say of this moment; called from another thread."""
        section = self.section_name
        return Beat(
            rank=rank,
            attempt=attempt,
            number=number,
            epoch=self.epoch,
            iteration=self.iteration,
            section=section if section in SECTIONS else "handler",
            seconds=round(max(0.0, self._clock() - self._since), 3),
            waiting=self.waiting,
            engine=self.engine,
            longest={name: round(lasted, 3) for name, lasted in list(self._longest.items())},
            own_step=round(statistics.median(self._own), 6) if self._steps >= RECENT else 0.0,
        )
