"""What an engine is asked to do while it runs: end, end the epoch, be suspended, take other data.

Contract: a step, a handler or a signal asks; alone it is done at once, among ranks it is put to the next vote and done
on all of them when that has been counted. `Engine` builds on this as it does on `Listening`; its loop reads `asked`,
and the vote takes from `requests`. Outside a run a request changes nothing.
"""

from __future__ import annotations

from typing import Any

from allstep.coordination import OUTCOMES, Alone, Asked, Coordinator, Outcome, Request
from allstep.engine.loop import LOOK_NOW, Loop
from allstep.engine.run import Progress
from allstep.engine.run_plan import check_choice
from allstep.engine.source import END
from allstep.engine.state import State
from allstep.world import World, internals


class Steering:
    """How the course of a run is changed from inside it.

    Attributes:
        progress: what the counters do not tell about a run left in its middle.
        asked: what holds now and the loop has not acted on yet.
        requests: what was asked for on this rank and not voted on yet.
        skips_completed: whether COMPLETED is left out after the end that was asked for.
        skips_epoch_completed: the same of EPOCH_COMPLETED.
    """

    state: State

    def __init__(self, coordinator: Coordinator | None) -> None:
        self.progress = Progress()
        self.asked: set[Request] = set()
        self.requests: list[Asked] = []
        self.skips_completed = False
        self.skips_epoch_completed = False
        self._waiting_data: Any = END
        self._given_coordinator = coordinator
        self._loop: Loop | None = None

    @property
    def coordinator(self) -> Coordinator:
        """How this engine's ranks agree."""
        if self._given_coordinator is not None:
            return self._given_coordinator
        world = World.current()
        return Alone() if world is None else internals(world).coordinator

    @property
    def should_terminate(self) -> bool:
        """Whether the run is to end."""
        return Request.TERMINATE in self.asked

    @property
    def should_terminate_single_epoch(self) -> bool:
        """Whether the epoch is to end."""
        return Request.TERMINATE_EPOCH in self.asked

    @property
    def should_interrupt(self) -> bool:
        """Whether the run is to be suspended."""
        return Request.INTERRUPT in self.asked

    def terminate(
        self,
        skip_completed: bool = False,
        *,
        reason: str | None = None,
        agreed: bool = False,
        outcome: Outcome = "left",
    ) -> None:
        """Ask for the run's end.

        Alone it holds after the event in whose handler this is called, or after the step. With several ranks any of
        them may ask: all end at the same iteration, on a group's boundary, by the end of the next window, and at once
        when it is asked for in a handler of EPOCH_COMPLETED. TERMINATE is fired, then COMPLETED unless
        `skip_completed`; not EPOCH_COMPLETED of an epoch in its middle. A next `run` goes on with the epoch after it.

        Args:
            skip_completed: leave out COMPLETED.
            reason: what `state.stop_reason` says, after the rank.
            agreed: all ranks call this at the same iteration, so it holds at once; they check that it is so.
            outcome: "left" where the run is to go on another time; "preempted" where it has to make room, so that a
                `Preemption` that is attached ends the process with exit code 85, unless the run is complete;
                "finished" where it has reached its goal, so that a run which goes on from the saved state trains
                nothing; "failed" where its state is of no use, so that a `Checkpoint` does not save it. Where several
                are asked for, the last of these four holds.

        Raises:
            ValueError: outcome is none of these.
        """
        check_choice("outcome", outcome, OUTCOMES)
        # It may be a handler, given an engine as its first argument.
        self._ask(Request.TERMINATE, reason, skip_completed is True, at_once=agreed, outcome=outcome)

    def terminate_epoch(self, skip_epoch_completed: bool = False, *, reason: str | None = None) -> None:
        """Ask for the epoch's end, which holds as that of `terminate` does.

        TERMINATE_SINGLE_EPOCH is fired, then EPOCH_COMPLETED unless `skip_epoch_completed`; the next epoch begins a new
        pass over the data.
        """
        self._ask(Request.TERMINATE_EPOCH, reason, skip_epoch_completed is True)

    def interrupt(self, *, reason: str | None = None) -> None:
        """Ask for the run to be suspended, which holds as the end by `terminate` does.

        INTERRUPT is fired and `run` returns; the next call of `run` goes on at the very place.
        """
        self._ask(Request.INTERRUPT, reason, False)

    def set_data(self, data: Any) -> None:
        """Take batches from `data`; the epoch's length stays.

        Alone, and between passes, from the next batch on; with several ranks, inside a pass, when it has been voted on,
        as an end by `terminate` is. Ranks may replace their data one by one.
        """
        if self._votes and self._loop is not None and self._loop.supply.takes_batches:
            self._waiting_data = data
            self._ask(Request.REPLACE_DATA, None, False)
            return
        self.state.dataloader = data
        if self._loop is not None:
            self._loop.replace_data(data)

    def take(self, asked: Asked) -> None:
        """Do what was asked for and, where ranks vote, agreed."""
        state, loop = self.state, self._loop
        if loop is None:
            return
        if asked.request is Request.REPLACE_DATA:
            if asked.rank == self.coordinator.rank and self._waiting_data is not END:
                state.dataloader, self._waiting_data = self._waiting_data, END
                loop.replace_data(state.dataloader)
            return
        if asked.request is Request.TERMINATE:
            self.progress.abandoned = self.progress.epoch_is_open
            self.note_end(asked)
        elif asked.request is Request.TERMINATE_EPOCH:
            self.skips_epoch_completed = asked.skip
        self.asked.add(asked.request)
        loop.until = LOOK_NOW

    def note_end(self, asked: Asked) -> None:
        """Note what an end that was agreed means, also where the run had come to its own end before that was known."""
        state = self.state
        self.skips_completed = asked.skip
        if state.outcome is None or OUTCOMES.index(asked.outcome) > OUTCOMES.index(state.outcome):
            state.stop_reason, state.outcome = f"rank {asked.rank}: {asked.reason}", asked.outcome
        self.asked.add(Request.TERMINATE)

    @property
    def _votes(self) -> bool:
        return self._loop is not None and self._loop.supply.agreed is not None

    def _ask(
        self, request: Request, reason: str | None, skip: bool, *, at_once: bool = False, outcome: Outcome = "left"
    ) -> None:
        why = reason or f"{request.value}() at iteration {self.state.iteration}"
        asked = Asked(request, self.coordinator.rank, why, skip, outcome)
        if self._votes and not at_once:
            self.requests.append(asked)
        else:
            self.take(asked)

    def _forget_requests(self) -> None:
        self.requests.clear()
        self._waiting_data = END
        self.asked.clear()
        self.skips_completed = self.skips_epoch_completed = False
