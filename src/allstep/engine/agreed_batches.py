"""The batches of a rank that agrees with others: what the loop takes from in place of the data itself.

Contract: the loop opens an `AgreedBatches` at the beginning of a pass and takes one batch an iteration. The feed holds
a vote on each window of iterations before it is run, one window ahead and asynchronously, or, with a window of one
group, just before it. From the vote it sets, for each iteration, `state.weight`, `state.active`, `state.group_end` and
`state.samples`. The loop calls `advance` when a window ends, `report_unread` before the handlers of EPOCH_COMPLETED and
`close_epoch` after them, and heeds what has landed then. A rank without a batch for an iteration is given a filler: the
last batch it had, or one of another rank's.

Who says what when. At the beginning of window w each rank reads the result of the vote on w, which was cast at the
beginning of w - 1, and casts the vote on w + 1: how many samples it has for each of its iterations, and what was asked
for on this rank until now. So a request made in w is cast at the beginning of w + 1 and lands at its end. In between
nothing is waited for. No vote is cast on iterations beyond an epoch's end that is known.

The rank's own batches lie in a `BatchBuffer`, votes are cast and read by `Voting`. What can go wrong is raised on
every rank alike: data that gave less than it declared, uneven data under "error", ranks that came to different votes.

A rank's votes, one after another: cast, read, and what they say besides the window.

Contract: an `AgreedBatches` casts a vote at the points that all ranks reach alike and reads it there or later; votes
are read in the order in which they were cast. A vote carries what was asked for on this rank since the last one; once
it is read, what all ranks asked for has landed. What can go wrong is found by reading and raised on every rank alike:
ranks that came to different votes, and data that gave less than it declared. `say_uneven` is a third such error, which
the policy decides on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any, NoReturn

from allstep.coordination import (
    Asked,
    Coordinator,
    Ledger,
    Occasion,
    Pending,
    Request,
    Uneven,
    Vote,
    VoteResult,
    agree_window,
    next_window,
    read_result,
    vector_length,
)
from allstep.engine.prefetch import BatchBuffer, BatchReader
from allstep.engine.source import END
from allstep.engine.state import State
from allstep.errors import DataError, DivergenceError, UnevenDataError


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an engine's ranks agree during a run; the same on all ranks.

    Attributes:
        policy: what ends a pass over uneven data.
        group_size: iterations in an accumulation group.
        longest_window: groups in a window at the most.
        ahead: whether votes are cast one window ahead.
        needs_fillers: whether a rank without a batch runs the step.
    """

    policy: Uneven
    group_size: int
    longest_window: int
    ahead: bool
    needs_fillers: bool


@dataclass(frozen=True, slots=True)
class Unread:
    """What a rank left unread when a pass ended for all: the batches that are known, the samples in those counted."""

    rank: int
    batches: int
    samples: int


class AgreedBatches:
    """A rank's batches, agreed with the other ranks.

    Attributes:
        limit: the iteration at which the epoch, or the run, ends; infinity while unknown. Set by the loop.
        window_ends_at: the iteration at which the present window ends.
    """

    def __init__(self, coordinator: Coordinator, agreement: Agreement, state: State, requests: list[Asked]) -> None:
        self._coordinator = coordinator
        self._agreement = agreement
        self._state = state
        self._stock = BatchBuffer(agreement.group_size)
        most_iterations = agreement.longest_window * agreement.group_size
        self._voting = Voting(coordinator, state, self._stock, requests, most_iterations)
        self._left_behind = (0, 0)
        self._unread_is_said = False
        self._cast: PendingVote | None = None
        self._groups = 1
        self._window_began = self._paused_at = monotonic_ns()
        self._window_took = 0
        self._counts: list[int | None] = []
        self._ledger = Ledger(0, True, False, (), agreement.group_size)
        self._at = 0
        self._left = 0
        self.limit: float = math.inf
        self.window_ends_at = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """This rank's batch for the next iteration, or a filler; StopIteration when the pass has ended for all.

        None where a rank that skips the step never had a batch.
        """
        at, ledger, state = self._at, self._ledger, self._state
        if at >= ledger.iterations:
            raise StopIteration
        self._at = at + 1
        batch = self._stock.give(state.iteration, begins_group=at % self._agreement.group_size == 0)
        state.active = batch is not END
        state.samples = (self._counts[at] or 0) if state.active else 0
        state.weight = ledger.weight(at, state.samples, self._coordinator.world_size)
        state.group_end = ledger.ends_group(at)
        if batch is END:
            batch = self._stock.filler
        return None if batch is END else batch

    def take_landed(self) -> list[Asked]:
        """What the ranks agreed to do since the last call."""
        landed, self._voting.landed = self._voting.landed, []
        return landed

    def end_pass(self, *, loses_unread: bool) -> list[Any]:
        """Leave a pass that has ended for all; returns the batches that were read and neither given nor wait.

        `loses_unread` says that the data does not give them in its next pass, so that they are to be reported.
        """
        agreed = self._ledger.iterations
        self._stock.carry_over([self._counts[at] for at in range(agreed, agreed + self._left)])
        self._left = 0
        if loses_unread and not self._unread_is_said and self._agreement.policy != "longest":
            batches, samples = self._stock.unread_of_pass()
            self._left_behind = (self._left_behind[0] + batches, self._left_behind[1] + samples)
        return self._stock.kept()

    def open_pass(self, reader: BatchReader | None = None) -> None:
        """Take from `reader`, or go on with the same one: a vote on the first window is held at once.

        A window that was agreed and is not run is agreed anew.
        """
        self._left = 0
        if reader is not None:
            self._stock.begin(reader)
            self._unread_is_said = False
        self._cast = self._cast_window(offset=0)
        self._enter_next_window()

    def abandon_pass(self, *, group_is_undone: bool = False) -> list[Any]:
        """End the pass here; returns the batches that were read and not given, or given to a group that is undone."""
        self._left, self._at = 0, 0
        self._ledger = Ledger(0, True, False, (), self._agreement.group_size)
        return self._stock.abandon(group_is_undone=group_is_undone)

    def taken_by(self, iteration: int) -> int | None:
        """This rank's batches of the pass in the first `iteration` iterations of the run, which end a group.

        None where batches wait for the rest of their group.
        """
        return None if self.waiting else self._stock.taken_by(iteration)

    @property
    def pass_has_ended(self) -> bool:
        """Whether the ranks agreed that the pass has no more iterations."""
        return self._ledger.ends_pass and not self.has_more()

    @property
    def waiting(self) -> int:
        """Iterations whose batches wait for the rest of their group, across a pass's end."""
        return self._left or self._stock.carried

    def advance(self) -> None:
        """Go on to the next window, unless the pass or the epoch has ended; called when the present one has."""
        if self.has_more() or self._ledger.ends_pass or self._state.iteration >= self.limit:
            return
        if self._cast is None:
            self._cast = self._cast_window(offset=0)
        self._enter_next_window()

    def report_unread(self) -> tuple[Unread, ...]:
        """What each rank left unread, when the pass ended because one ran out; called where an epoch has ended."""
        self._paused_at = monotonic_ns()
        if self._agreement.policy == "longest":
            return ()
        self.drain()
        now, before = self._stock.unread(), self._left_behind
        self._left_behind = (0, 0)
        result = self._hold(Occasion.EPOCH_END, unread=now[0] + before[0])
        if not result.unread:
            return ()
        said = self._coordinator.gather((now, before))
        ran_out = self._unread_is_said = any(batches == 0 for (batches, _), _ in said)
        left = [
            Unread(rank, present[0] * ran_out + earlier[0], present[1] * ran_out + earlier[1])
            for rank, (present, earlier) in enumerate(said)
        ]
        return tuple(each for each in left if each.batches)

    def close_epoch(self) -> None:
        """Hold the vote of an epoch's end, on what was asked for in its handlers."""
        self.drain()
        self._hold(Occasion.EPOCH_END)
        self._window_began += monotonic_ns() - self._paused_at  # handlers of the epoch's end are no part of a window

    def confirm_end(self) -> None:
        """Check that all ranks end the run here, as `terminate(agreed=True)` says. Raises DivergenceError."""
        self.drain()
        self._hold(Occasion.RUN_END)

    def drain(self) -> None:
        """Read the vote that is under way, if any, but run no window of it; the batches it was about stay."""
        if self._cast is not None:
            cast, self._cast = self._cast, None
            self._voting.read(cast)

    def has_more(self) -> bool:
        """Whether the pass has another iteration."""
        return self._at < self._ledger.iterations

    def total(self) -> int:
        """Batches in this rank's pass, as far as known."""
        return self._stock.total()[0]

    def _enter_next_window(self) -> None:
        """Read the vote on the next window and, unless there is a reason to wait, cast the one on the window after."""
        now = monotonic_ns()
        self._window_took, self._window_began = now - self._window_began, now
        cast, agreement = self._cast, self._agreement
        assert cast is not None
        self._cast = None
        result = self._voting.read(cast)
        self._ledger = ledger = agree_window(
            result,
            agreement.policy,
            self._coordinator.world_size,
            agreement.group_size,
            group_goes_on=self._state.epoch_length is not None,
            carried=self._stock.carried,
        )
        if ledger.is_uneven and agreement.policy == "error":
            self._voting.say_uneven()
        self._counts, self._at = list(cast.vote.samples), 0
        self._groups = next_window(
            self._groups, result.microseconds, self._coordinator.world_size, agreement.longest_window
        )
        self.window_ends_at = self._state.iteration + ledger.iterations
        if ledger.ends_pass:
            self._left = self._agreed_iterations(result) - ledger.iterations
        elif agreement.ahead and not self._voting.landed and self.window_ends_at < self.limit:
            self._cast = self._cast_window(offset=ledger.iterations)

    def _cast_window(self, offset: int) -> PendingVote:
        wanted = self._groups * self._agreement.group_size
        iterations = int(min(wanted, self.limit - self._state.iteration - offset))
        if offset == 0 and self._agreement.needs_fillers:
            self._stock.first()  # where there is none, there is nothing to take part with
        samples = self._stock.look(offset, offset + iterations)
        self._stock.read_ahead(offset + iterations)
        begins_without = bool(samples) and not samples[0] and self._stock.filler is END
        return self._voting.cast(
            Occasion.WINDOW,
            samples=samples,
            needs_batch=self._agreement.needs_fillers and begins_without,
            microseconds=self._window_took // 1000,
        )

    def _hold(self, occasion: Occasion, **more: Any) -> VoteResult:
        return self._voting.read(self._voting.cast(occasion, **more))

    def _agreed_iterations(self, result: VoteResult) -> int:
        needed = 1 if self._agreement.policy == "longest" else self._coordinator.world_size
        return next((at for at, having in enumerate(result.having) if having < needed), len(result.having))


_LEAST_ITERATIONS_IN_A_VECTOR = 32  # so that engines of different groups send vectors of one length


@dataclass(frozen=True, slots=True)
class PendingVote:
    """A vote under way: its result when that has come, what this rank said in it, and what was asked for here."""

    pending: Pending
    vote: Vote
    requests: tuple[Asked, ...]


class Voting:
    """Casts and reads an engine's votes. `most_iterations` is the longest window that one is about.

    Attributes:
        requests: what was asked for on this rank and not voted on yet; the engine appends.
        landed: what has been agreed to do; the feed's owner takes it.
    """

    def __init__(
        self, coordinator: Coordinator, state: State, stock: BatchBuffer, requests: list[Asked], most_iterations: int
    ) -> None:
        self._coordinator = coordinator
        self._state = state
        self._stock = stock
        self._vector_length = vector_length(max(_LEAST_ITERATIONS_IN_A_VECTOR, most_iterations))
        self._sequence = 0
        self.requests = requests
        self.landed: list[Asked] = []

    def cast(self, occasion: Occasion, **more: Any) -> PendingVote:
        """Begin a vote. `more` is what a `Vote` of this occasion says."""
        requests = tuple(self.requests)  # once: the handler of a signal may add to them at any moment
        del self.requests[: len(requests)]
        asked = {each.request for each in requests}
        vote = Vote(
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
        return PendingVote(self._coordinator.vote(vote.vector(self._vector_length)), vote, requests)

    def read(self, cast: PendingVote) -> VoteResult:
        """Wait for a vote and act on all that it says besides the window: names, fillers, errors."""
        result = read_result(cast.pending.wait(), len(cast.vote.samples))
        if not result.is_for(cast.vote, self._coordinator.world_size):
            self._say_diverged(cast.vote)
        if result.gave_less:
            self._say_gave_less()
        if result.requests:
            self.landed += [each for asked in self._coordinator.gather(cast.requests) for each in asked]
        if result.needs_batch:
            self._share_batch()
        return result

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

    def _say_diverged(self, vote: Vote) -> NoReturn:
        state = self._state
        said = self._coordinator.gather((vote.occasion.name.lower().replace("_", " "), state.epoch, state.iteration))
        where = "; ".join(f"rank {rank}: {o}, epoch {e}, iteration {i}" for rank, (o, e, i) in enumerate(said))
        raise DivergenceError(
            f"ranks came to different votes: {where}. terminate(agreed=True) must be called on all ranks at the same "
            "iteration, and engines that do not run on all ranks need Engine(step, coordinator=Alone())"
        )
