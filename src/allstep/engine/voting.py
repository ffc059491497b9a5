"""A rank's votes, one after another: cast, read, and what they say besides the window.

Contract: an `AgreedFeed` casts a vote at the points that all ranks reach alike and reads it there or later; votes are
read in the order in which they were cast. A vote carries what was asked for on this rank since the last one; once it is
read, what all ranks asked for has landed. What can go wrong is found by reading and raised on every rank alike: ranks
that came to different votes, and data that gave less than it declared. `say_uneven` is a third such error, which the
policy decides on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from allstep.coordination import (
    Asked,
    Ballot,
    Coordinator,
    Occasion,
    Pending,
    Request,
    Tally,
    read_tally,
    vector_length,
)
from allstep.engine.source import END
from allstep.engine.state import State
from allstep.engine.stock import Stock
from allstep.errors import DataError, DivergenceError, UnevenDataError

_LEAST_ITERATIONS_IN_A_VECTOR = 32  # so that engines of different groups send vectors of one length


@dataclass(frozen=True, slots=True)
class Cast:
    """A vote under way: its result when that has come, what this rank said in it, and what was asked for here."""

    pending: Pending
    ballot: Ballot
    requests: tuple[Asked, ...]


class Voting:
    """Casts and reads an engine's votes. `most_iterations` is the longest window that one is about.

    Attributes:
        requests: what was asked for on this rank and not voted on yet; the engine appends.
        landed: what has been agreed to do; the feed's owner takes it.
    """

    def __init__(
        self, coordinator: Coordinator, state: State, stock: Stock, requests: list[Asked], most_iterations: int
    ) -> None:
        self._coordinator = coordinator
        self._state = state
        self._stock = stock
        self._vector_length = vector_length(max(_LEAST_ITERATIONS_IN_A_VECTOR, most_iterations))
        self._sequence = 0
        self.requests = requests
        self.landed: list[Asked] = []

    def cast(self, occasion: Occasion, **more: Any) -> Cast:
        """Begin a vote. `more` is what a `Ballot` of this occasion says."""
        requests = tuple(self.requests)  # once: the handler of a signal may add to them at any moment
        del self.requests[: len(requests)]
        asked = {each.request for each in requests}
        ballot = Ballot(
            occasion,
            self._sequence,
            self._state.iteration,
            terminate=Request.TERMINATE in asked,
            terminate_epoch=Request.TERMINATE_EPOCH in asked,
            interrupt=Request.INTERRUPT in asked,
            replace_data=Request.REPLACE_DATA in asked,
            gave_less=self._stock.gave_less is not None,
            **more,
        )
        self._sequence += 1
        return Cast(self._coordinator.vote(ballot.vector(self._vector_length)), ballot, requests)

    def read(self, cast: Cast) -> Tally:
        """Wait for a vote and act on all that it says besides the window: names, fillers, errors."""
        tally = read_tally(cast.pending.wait(), len(cast.ballot.samples))
        if not tally.is_for(cast.ballot, self._coordinator.world_size):
            self._say_diverged(cast.ballot)
        if tally.gave_less:
            self._say_gave_less()
        if tally.requests:
            self.landed += [each for asked in self._coordinator.gather(cast.requests) for each in asked]
        if tally.needs_batch:
            self._share_batch()
        return tally

    def say_uneven(self) -> NoReturn:
        """Raise UnevenDataError with every rank's number of batches."""
        said = self._coordinator.gather(self._stock.total())
        counts = ", ".join(
            f"rank {rank} has {count}" if exact else f"rank {rank} has {count} or more"
            for rank, (count, exact) in enumerate(said)
        )
        raise UnevenDataError(
            f"ranks have different numbers of batches, and uneven='error' was given: {counts}. Give every rank the "
            "same number, or choose uneven='shortest' or 'longest'",
            counts=tuple(count for count, _ in said),
        )

    def _share_batch(self) -> None:
        """Give every rank that never had a batch one of the first rank that has any."""
        mine = self._stock.first()
        having = self._coordinator.gather(mine is not END)
        if any(having):
            source = having.index(True)
            shared = self._coordinator.broadcast(mine if source == self._coordinator.rank else None, source)
            if self._stock.filler is END:
                self._stock.filler = shared

    def _say_gave_less(self) -> NoReturn:
        said = self._coordinator.gather(self._stock.gave_less)
        culprits = "; ".join(f"rank {rank} {text}" for rank, text in enumerate(said) if text)
        raise DataError(
            f"data ended before what it had declared: {culprits}. Its len() must be the number of batches it gives"
        )

    def _say_diverged(self, ballot: Ballot) -> NoReturn:
        state = self._state
        said = self._coordinator.gather((ballot.occasion.name.lower().replace("_", " "), state.epoch, state.iteration))
        where = "; ".join(f"rank {rank}: {o}, epoch {e}, iteration {i}" for rank, (o, e, i) in enumerate(said))
        raise DivergenceError(
            f"ranks came to different votes: {where}. terminate(agreed=True) must be called on all ranks at the same "
            "iteration, and engines that do not run on all ranks need Engine(step, coordinator=Alone())"
        )
