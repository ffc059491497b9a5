"""Where this rank is: written by the thread that trains, read by the thread that sends heartbeats.

There is one `RankActivity` per World. The training thread says when it enters a section, begins and ends to wait for
its peers, and has done a step. That is attribute stores and, once per section, one reading of the clock. It takes no
lock, because it is done in every iteration. The other thread calls `heartbeat`, which may see a store of the moment
before; nothing depends on more.

Any change of section is progress, and so are the beginning and the end of a wait: `Heartbeat.seconds` counts from
there. So a loop of the user's own, which enters no section, is seen to go on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from allstep.protocol.messages import SECTIONS, Heartbeat

RECENT = 20
"""Steps over which a rank's own time is taken."""


class RankActivity:
    """Where one rank is.

    Attributes:
        epoch, iteration: how far the running engine has come; set by the engine.
        engine: its name; empty between runs.
        section_name: one of `SECTIONS`, or a name of the user's own.
        waiting: what it waits for its peers in; empty where it does not wait.
        when_met: called when a wait ended with all peers there. Then the rank goes on after whatever it had reported.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.epoch = 0
        self.iteration = 0
        self.engine = ""
        self.section_name = "startup"
        self.waiting = ""
        self.when_met: Callable[[], None] | None = None
        self._clock = clock
        self._since = clock()
        self._longest: dict[str, float] = {}
        self._waited_since = 0.0
        self._waited = 0.0
        self._step_began: float | None = None
        self._own = [0.0] * RECENT  # seconds of the last steps without waiting, as a ring
        self._steps = 0
        self._runs = 0
        self._forwards: dict[int, int] = {}  # by module, the iteration of a forward pass that has had no backward yet
        self._left_out = 0
        self._passes: dict[int, tuple[int, int]] = {}  # by module, an iteration and the backward passes in it
        self._most_passes = 0
        self._goal: Callable[[], int] = lambda: 0

    def enter(self, section: str) -> None:
        """Say that the rank is now in `section`, one of `SECTIONS`, or made progress in the one where it is."""
        self._progress()
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
    def run(self, engine: str, goal: Callable[[], int] = lambda: 0) -> Iterator[None]:
        """Be in the run of an engine; where it runs inside another, the outer one's place is restored afterwards.

        Args:
            engine: its name.
            goal: how many iterations it is to have, 0 where that is not known; called from the other thread.
        """
        before = (self.engine, self.epoch, self.iteration, self.section_name, self._step_began)
        self.engine, self._step_began = engine, None
        if not self._runs:
            self._goal = goal
        self._runs += 1
        try:
            yield
        finally:
            self._runs -= 1
            engine, epoch, iteration, section, self._step_began = before
            self.engine, self.waiting = engine, ""
            if self._runs:  # after the outermost run its place stays, for what is reported later
                self.epoch, self.iteration = epoch, iteration
            self.enter(section if self._runs else "idle")

    @property
    def nested(self) -> bool:
        """Whether the running engine was started from another one's step or handler."""
        return self._runs > 1

    @contextmanager
    def wait(self, what: str) -> Iterator[None]:
        """Wait for the peers in `what` for the length of a with block, which raises where they did not all come."""
        self.wait_began(what)
        try:
            yield
        except BaseException:
            self.wait_ended(met=False)
            raise
        self.wait_ended()

    def wait_began(self, what: str) -> None:
        """Say that the rank waits for its peers from now on, in `what` ("gradients", "all_reduce #3")."""
        self._progress()
        self._waited_since = self._since
        self.waiting = what

    def wait_ended(self, *, met: bool = True) -> None:
        """Say that the wait is over, and whether all came; the time it took is not the rank's own."""
        self._progress()
        self._waited += self._since - self._waited_since
        self.waiting = ""
        if met and self.when_met is not None:
            self.when_met()

    def step_begins(self, epoch: int, iteration: int) -> None:
        """Enter the section "step", at this place.

        The time since the last step began, less what was waited, is the rank's own time of an iteration. Only the
        outermost engine's steps count; where another engine ran in between, its time is part of them. One call with one
        reading of the clock, since it is made in every iteration.
        """
        # What `enter` does is written out, since this is called in every iteration.
        now = self._clock()
        lasted = now - self._since
        section = self.section_name
        if lasted > self._longest.get(section, 0.0):
            self._longest[section] = lasted
        self._since = now
        self.section_name = "step"
        self.epoch = epoch
        self.iteration = iteration
        if self._step_began is not None:
            self._own[self._steps % RECENT] = now - self._step_began - self._waited
            self._steps += 1
        self._step_began = now
        self._waited = 0.0

    def forward_ends(self, module: int) -> None:
        """A forward pass of a module has ended whose backward pass is to reduce gradients."""
        earlier = self._forwards.get(module, 0)
        if earlier and earlier != self.iteration:
            self._left_out = earlier
        self._forwards[module] = self.iteration

    def backward_begins(self, module: int) -> None:
        """The backward pass of a module begins, in which gradients are reduced."""
        self._forwards.pop(module, None)
        iteration, count = self._passes.get(module, (0, 0))
        count = count + 1 if iteration == self.iteration else 1
        self._passes[module] = self.iteration, count
        if count > self._most_passes:
            self._most_passes = count

    @property
    def left_out(self) -> int:
        """The last iteration whose forward pass had no backward pass; 0 where each had one."""
        # One that was in the present step may still be on its way to its backward pass, unless the step is over.
        over = self.section_name != "step" or self.waiting not in ("", "buffers", "gradients")
        pending = [at for at in list(self._forwards.values()) if at and (at < self.iteration or over)]
        return max([self._left_out, *pending])

    @property
    def most_passes(self) -> int:
        """The most backward passes that a module had in one iteration."""
        return self._most_passes

    def _progress(self) -> None:
        now = self._clock()
        lasted = now - self._since
        if lasted > self._longest.get(self.section_name, 0.0):
            self._longest[self.section_name] = lasted
        self._since = now

    def heartbeat(self, rank: int, attempt: int, number: int) -> Heartbeat:
        """What to say of this moment; called from another thread."""
        section = self.section_name
        return Heartbeat(
            rank=rank,
            attempt=attempt,
            number=number,
            epoch=self.epoch,
            iteration=self.iteration,
            section=section if section in SECTIONS else "handler",
            seconds=round(max(0.0, self._clock() - self._since), 3),
            waiting=self.waiting,
            engine=self.engine,
            # A copy first: the other thread may add a section while this one goes through them.
            longest={name: round(lasted, 3) for name, lasted in list(self._longest.items())},
            left_out=self.left_out,
            most_passes=self._most_passes,
            own_step=round(statistics.median(self._own), 6) if self._steps >= RECENT else 0.0,
            goal=self._goal(),
        )
