"""The batches of a rank that agrees with others: when ranks vote, on what, and what follows for each iteration.

Contract: `Passes` opens `AgreedBatches` at the beginning of a pass, and the loop takes one batch an iteration. A vote
on each window of iterations is held before it is run: one window ahead and asynchronously, or, with a window of one
group, just before it. From the vote each iteration gets its `state.weight`, `state.active`, `state.group_end` and
`state.samples`. A rank without a batch for an iteration is given a filler: a copy of a batch it had, or of another
rank's.

Who says what when. At the beginning of window w each rank reads the result of the vote on w, which was cast at the
beginning of w - 1, and casts the vote on w + 1. It says how many samples it has for each of its iterations, and what
was asked for on this rank until now. So a request made in w is cast at the beginning of w + 1 and lands at its end. In
between nothing is waited for. No vote is cast on iterations beyond an epoch's end that is known. Two more votes are
held where an epoch ends, and one where the run does.

How long a window is follows from agreed numbers only: it doubles while one takes less than half a second, within what
the ranks may read ahead. By default that is few batches at first. Each rank says in its votes how far it could go
before what it holds takes 64 MB, and all go as far as the least of them.

What can go wrong is raised on every rank alike: data that gave less than it declared, uneven data under "error", ranks
that came to different votes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any, NoReturn

from allstep.coordination import (
    MOST_DOUBLINGS,
    Ledger,
    Occasion,
    PendingSum,
    Request,
    RequestKind,
    Vote,
    VoteResult,
    agree_length,
    agree_window,
    next_window,
    read_result,
    vector_length,
)
from allstep.engine.prefetch import BatchBuffer, BatchReader
from allstep.engine.rank_sums import land_sums, read_sums
from allstep.engine.run import Run
from allstep.engine.source import END
from allstep.errors import DataError, DivergenceError, UnevenDataError

_LEAST_ITERATIONS_IN_A_VECTOR = 32  # so that engines of different groups send vectors of one length
_BYTES_READ_AHEAD = 64 << 20


@dataclass(frozen=True, slots=True)
class Unread:
    """What a rank left unread when a pass ended for all: the batches that are known, the samples in those counted."""

    rank: int
    batches: int
    samples: int


class AgreedBatches:
    """A rank's batches, agreed with the other ranks. Made where `run.handshake` says how they agree."""

    def __init__(self, run: Run) -> None:
        assert run.handshake is not None
        self._run = run
        self._agreement = agreement = run.handshake.agreement
        self._buffer = BatchBuffer(agreement.group_size)
        most_groups = max(1, agreement.longest_window(agreement.doublings))
        self._voting = Voting(run, self._buffer, most_groups * agreement.group_size)
        self._left_behind = (0, 0)
        self._unread_is_said = False
        self._pending: PendingVote | None = None
        self._groups = 1
        self._window_began = self._paused_at = monotonic_ns()
        self._window_took = 0
        self._ledger = Ledger(0, True, False, (), agreement.group_size)
        self._counts: list[int | None] = []
        self._at = 0  # iterations of the ledger that were begun
        self._left = 0  # iterations behind the ledger's whose batches wait for the rest of their group

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """This rank's batch for the next iteration, or a filler; StopIteration when the pass has ended for all.

        None where a rank that skips the step never had a batch.
        """
        at, ledger, state = self._at, self._ledger, self._run.state
        if at >= ledger.iterations:
            raise StopIteration
        self._at = at + 1
        samples = self._counts[at] or 0  # None was promised for an iteration without a batch
        batch = self._buffer.give(state.iteration, samples, begins_group=at % self._agreement.group_size == 0)
        state.active = batch is not END
        state.samples = samples if state.active else 0
        state.weight = ledger.weight(at, state.samples, self._run.coordinator.data.size)
        state.group_end = ledger.ends_group(at)
        if batch is END:
            batch = self._buffer.filler()
        return None if batch is END else batch

    def take_landed(self) -> list[Request]:
        """What the ranks agreed to do since the last call."""
        landed, self._voting.landed = self._voting.landed, []
        return landed

    def end_pass(self, *, loses_unread: bool) -> list[Any]:
        """Leave a pass that has ended for all; returns the batches that were read and neither given nor wait.

        `loses_unread` says that the data does not give them in its next pass, so that they are to be reported.
        """
        agreed = self._ledger.iterations
        # Ranks agreed on these iterations, and the epoch goes on: the next pass completes their group.
        self._buffer.carry_over([self._counts[at] for at in range(agreed, agreed + self._left)])
        self._left = 0
        if loses_unread and not self._unread_is_said and self._agreement.policy != "longest":
            batches, samples = self._buffer.unread_of_pass()
            self._left_behind = (self._left_behind[0] + batches, self._left_behind[1] + samples)
        return self._buffer.kept()

    def open_pass(
        self, reader: BatchReader | None = None, *, is_one_shot: bool = False, other_length: bool = False
    ) -> None:
        """Take from `reader`, or go on with the same one: a vote on the first window is held at once.

        A window that was agreed and is not run is agreed anew. `is_one_shot` says that what is read cannot be read
        again, `other_length` that this rank's data has another length than was agreed: then all ranks agree on the
        pass's length again.
        """
        self._left = 0
        if reader is not None:
            self._buffer.begin(reader, is_one_shot=is_one_shot)
            self._unread_is_said = False
        self._pending = self._cast_window(offset=0, other_length=other_length)
        self._enter_next_window()

    def abandon_pass(self, *, group_is_undone: bool = False) -> list[Any]:
        """End the pass here; returns the batches that were read and not given, or given to a group that is undone."""
        self._left, self._at = 0, 0
        self._ledger = Ledger(0, True, False, (), self._agreement.group_size)
        return self._buffer.abandon(group_is_undone=group_is_undone)

    def taken_by(self, iteration: int) -> int | None:
        """This rank's batches of the pass in the first `iteration` iterations of the run, which end a group.

        None where batches wait for the rest of their group.
        """
        return None if self.waiting else self._buffer.taken_by(iteration)

    @property
    def pass_has_ended(self) -> bool:
        """Whether the ranks agreed that the pass has no more iterations."""
        return self._ledger.ends_pass and not self.has_more()

    @property
    def waiting(self) -> int:
        """Iterations whose batches wait for the rest of their group, across a pass's end."""
        return self._left or self._buffer.carried

    def advance(self) -> None:
        """Go on to the next window, unless the pass or the epoch has ended; called when the present one has."""
        if self.has_more() or self._ledger.ends_pass or self._run.state.iteration >= self._run.ends_at:
            return
        if self._pending is None:
            self._pending = self._cast_window(offset=0)
        self._enter_next_window()

    def report_unread(self) -> tuple[Unread, ...]:
        """What each rank left unread, when the pass ended because one ran out; called where an epoch has ended."""
        self._paused_at = monotonic_ns()
        is_longest = self._agreement.policy == "longest"
        if is_longest and not self._voting.sums:
            return ()
        # The vote under way is about iterations that do not come; all ranks read it before they hold another.
        self.drain()
        now, before = self._buffer.unread(), self._left_behind
        self._left_behind = (0, 0)
        result = self._hold(Occasion.EPOCH_END, unread=0 if is_longest else now[0] + before[0])
        if not result.unread:
            return ()
        said, sharing = self._run.coordinator.gather((now, before)), self._run.coordinator.data.sharing
        # Where every rank has batches left, the epoch had its length, and the next one goes on with them.
        ran_out = self._unread_is_said = any(batches == 0 for (batches, _), _ in said)
        left = [
            Unread(rank, present[0] * ran_out + earlier[0], present[1] * ran_out + earlier[1])
            for rank, (present, earlier) in enumerate(said)
            if rank % sharing == 0
        ]
        return tuple(each for each in left if each.batches)

    def close_epoch(self) -> None:
        """Hold the vote of an epoch's end, on what was asked for in its handlers."""
        self.drain()
        replicas = self._run.replicas
        audited = 0 if replicas is None else replicas.audit.number_at_end(self._run.state.iteration)
        self._hold(Occasion.EPOCH_END, fingerprint=audited)
        self._window_began += monotonic_ns() - self._paused_at  # handlers of the epoch's end are no part of a window

    def confirm_end(self) -> None:
        """Check that all ranks end the run here, as `terminate(agreed=True)` says. Raises DivergenceError."""
        self.drain()
        self._hold(Occasion.RUN_END)

    def drain(self) -> None:
        """Read the vote that is under way, if any, but run no window of it; the batches it was about stay."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._voting.read(pending)

    @property
    def has_undone(self) -> bool:
        """Whether batches were given to a group that is not complete, or to an iteration whose step did not return."""
        return self._at > self._run.steps_done - (self._run.window_ends_at - self._ledger.iterations)

    def has_more(self) -> bool:
        """Whether the pass has another iteration."""
        return self._at < self._ledger.iterations

    def total(self) -> int:
        """Batches in this rank's pass, as far as known."""
        return self._buffer.total()[0]

    def _enter_next_window(self) -> None:
        """Read the vote on the next window and, unless there is a reason to wait, cast the one on the window after."""
        now = monotonic_ns()
        self._window_took, self._window_began = now - self._window_began, now
        pending, agreement, run = self._pending, self._agreement, self._run
        world_size = run.coordinator.world_size
        assert pending is not None
        self._pending = None
        result = self._voting.read(pending)
        self._ledger = ledger = agree_window(
            result,
            agreement.policy,
            run.coordinator.data.size,
            agreement.group_size,
            group_goes_on=run.epoch_is_counted,
            carried=self._buffer.carried,
        )
        if ledger.is_uneven and agreement.policy == "error":
            self._voting.say_uneven()
        self._counts, self._at = list(pending.vote.samples), 0
        longest = agreement.longest_window(min(agreement.doublings, result.least_doublings(world_size)))
        self._groups = next_window(self._groups, result.microseconds, world_size, max(1, longest))
        run.window_began_at, run.group_totals = run.state.iteration, ledger.group_totals
        run.window_ends_at = run.window_began_at + ledger.iterations
        if ledger.ends_pass:
            self._left = self._agreed_iterations(result) - ledger.iterations
        # Not where something has landed: it may end the epoch or replace data, and then these iterations do not come.
        elif longest and not agreement.is_synchronous and not self._voting.landed and run.window_ends_at < run.ends_at:
            self._pending = self._cast_window(offset=ledger.iterations)

    def _cast_window(self, offset: int, *, other_length: bool = False) -> PendingVote:
        wanted = self._groups * self._agreement.group_size
        iterations = int(min(wanted, self._run.ends_at - self._run.state.iteration - offset))
        if offset == 0 and self._agreement.needs_fillers and not self._buffer.has_filler:
            self._buffer.first()  # where there is none, there is nothing to take part with
        replicas = self._run.replicas
        if replicas is not None and offset:
            replicas.check()  # this vote lands a window too late to follow a change
        samples = self._buffer.look(offset, offset + iterations)
        self._buffer.read_ahead(offset + iterations)
        # It would have to run the step with nothing at all, so another rank gives it a batch.
        begins_without = bool(samples) and not samples[0] and not self._buffer.has_filler
        return self._voting.cast(
            Occasion.WINDOW,
            samples=samples,
            needs_batch=self._agreement.needs_fillers and begins_without,
            microseconds=self._window_took // 1000,
            doublings=self._doublings(),
            model_changed=replicas is not None and not offset and replicas.have_changed(at_start=self._is_epochs_first),
            other_length=other_length,
            fingerprint=0 if replicas is None else replicas.audit.number_for_vote(self._run.state.iteration),
        )

    @property
    def _is_epochs_first(self) -> bool:
        return self._run.state.iteration == self._run.epoch_began_at

    def _doublings(self) -> int:
        """How often the default lookahead may be doubled before the batches that this rank holds take too much."""
        agreement = self._agreement
        if not agreement.doublings or agreement.lookahead is None:
            return MOST_DOUBLINGS
        one = self._buffer.bytes_of_batch()
        fitting = [
            at for at in range(agreement.doublings + 1) if (agreement.lookahead << at) * one <= _BYTES_READ_AHEAD
        ]
        return max(fitting, default=0)

    def _hold(self, occasion: Occasion, **more: Any) -> VoteResult:
        return self._voting.read(self._voting.cast(occasion, **more))

    def _agreed_iterations(self, result: VoteResult) -> int:
        needed = 1 if self._agreement.policy == "longest" else self._run.coordinator.data.size
        return next((at for at, having in enumerate(result.having) if having < needed), len(result.having))


@dataclass(frozen=True, slots=True)
class PendingVote:
    """A vote under way: its result when that has come, what this rank said in it, and what was asked for here."""

    sum: PendingSum
    vote: Vote
    requests: tuple[Request, ...]


class Voting:
    """Casts and reads a run's votes, in order. `most_iterations` is the longest window that one is about.

    A vote carries what was asked for on this rank since the last one. Once it is read, what all ranks asked for has
    landed.

    Attributes:
        landed: what has been agreed to do, and was not taken yet.
        sums: the numbers that votes carry for handlers: those that were there when the run began.
    """

    def __init__(self, run: Run, buffer: BatchBuffer, most_iterations: int) -> None:
        self._run = run
        self._buffer = buffer
        self.sums = tuple(run.sums)
        self._vector_length = vector_length(max(_LEAST_ITERATIONS_IN_A_VECTOR, most_iterations), len(self.sums))
        self._sequence = 0
        self.landed: list[Request] = []

    def cast(self, occasion: Occasion, **more: Any) -> PendingVote:
        """Begin a vote. `more` is what a `Vote` of this occasion says."""
        requests, replicas = self._run.take_requests(), self._run.replicas
        asked = {each.kind for each in requests}
        vote = Vote(
            occasion,
            self._sequence,
            self._run.state.iteration,
            terminate=RequestKind.TERMINATE in asked,
            terminate_epoch=RequestKind.TERMINATE_EPOCH in asked,
            interrupt=RequestKind.INTERRUPT in asked,
            replace_data=RequestKind.REPLACE_DATA in asked,
            gave_less=self._buffer.gave_less is not None,
            backward_passes=0 if replicas is None else replicas.backward_passes,
            sums=read_sums(self.sums),
            counts=not self._run.coordinator.data.is_twin,
            **more,
        )
        self._sequence += 1
        return PendingVote(self._run.coordinator.vote(vote.vector(self._vector_length)), vote, requests)

    def read(self, pending: PendingVote) -> VoteResult:
        """Wait for a vote and act on all that it says besides the window: names, fillers, errors."""
        result = read_result(pending.sum.wait(), len(pending.vote.samples), len(self.sums))
        # First: the numbers of ranks that came to different votes mean nothing together.
        if not result.is_for(pending.vote, self._run.coordinator.world_size):
            self._say_diverged(pending.vote)
        land_sums(self.sums, result.sums)
        replicas = self._run.replicas
        if replicas is not None and not result.same_backward_passes(self._run.coordinator.world_size):
            replicas.say_passes_differ(result.backward_passes)
        if replicas is not None and not result.same_fingerprints(self._run.coordinator.world_size):
            replicas.audit.say_differences()
        if result.gave_less:
            self._say_gave_less()
        if result.other_length:
            self._agree_length()
        # Names and reasons cost another collective, so only where somebody asked for something.
        if result.requests:
            self.landed += [each for said in self._run.coordinator.gather(pending.requests) for each in said]
        if result.model_changed and replicas is not None:
            replicas.settle()
        # On every rank, since all take part in giving one away.
        if result.needs_batch:
            self._share_batch()
        return result

    def say_uneven(self) -> NoReturn:
        """Raise UnevenDataError with every rank's number of batches."""
        said = self._run.coordinator.gather(self._buffer.total())
        counts = ", ".join(
            f"rank {rank} has {count}" if exact else f"rank {rank} has {count} or more"
            for rank, (count, exact) in enumerate(said)
        )
        raise UnevenDataError(
            f"ranks have different numbers of batches, and uneven='error' was given: {counts}. Give every rank the "
            "same number, or choose uneven='shortest' or 'longest'",
            counts=tuple(count for count, _ in said),
        )

    def _agree_length(self) -> None:
        """Agree again on the batches in the pass that begins, since some rank's data has other ones than before."""
        run, policy = self._run, self._run.handshake.agreement.policy if self._run.handshake else "shortest"
        said: list[tuple[int | None, int | None]] = run.coordinator.gather(run.own_lengths)
        run.pass_length = agree_length([exact for exact, _ in said], policy)
        run.show_length(agree_length([length for _, length in said], policy))

    def _share_batch(self) -> None:
        """Give every rank that never had a batch one of the first rank that has any."""
        mine = self._buffer.first()
        having = self._run.coordinator.gather(mine is not END)
        if any(having):
            source = having.index(True)
            shared = self._run.coordinator.broadcast(mine if source == self._run.coordinator.rank else None, source)
            if not self._buffer.has_filler:
                self._buffer.keep_filler(shared)

    def _say_gave_less(self) -> NoReturn:
        said = self._run.coordinator.gather(self._buffer.gave_less)
        culprits = "; ".join(f"rank {rank} {text}" for rank, text in enumerate(said) if text)
        raise DataError(
            f"data gave other than it had declared: {culprits}. Its len() must be the number of batches it gives, and "
            "each batch must hold the samples that were asked of the dataset, unless Engine(step, samples_in=function) "
            "counts them"
        )

    def _say_diverged(self, vote: Vote) -> NoReturn:
        state = self._run.state
        said = self._run.coordinator.gather(
            (vote.occasion.name.lower().replace("_", " "), state.epoch, state.iteration)
        )
        where = "; ".join(f"rank {rank}: {o}, epoch {e}, iteration {i}" for rank, (o, e, i) in enumerate(said))
        raise DivergenceError(
            f"ranks came to different votes: {where}. terminate(agreed=True) must be called on all ranks at the same "
            "iteration, and engines that do not run on all ranks need Engine(step, coordinator=Alone())"
        )
