"""What one rank says in a vote, and what all ranks together said.

Contract: a `Vote` becomes a vector of 64-bit integers of an agreed length; the vectors of all ranks are summed element
by element in one reduction; every rank reads the same `VoteResult` from the sum. So one tiny reduction answers how many
ranks have a batch for each coming iteration, how many samples those hold, and who wants what. Ranks that came to
different votes are noticed by all who took part: each vector says which vote it is meant for, by its occasion and by a
number for its place in the run with the square of that number. W ranks gave the same number exactly where W times the
sum of the squares is the square of the sum, so that no rank needs to know its own to see it. The numbers of backward
passes and the fingerprints of models are compared in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

_SAMPLE_BITS = 44  # of a number of the body; how many ranks have a batch is counted above them
_SAMPLES = (1 << _SAMPLE_BITS) - 1
_HEADER = 20
_PLACE_BITS = 20  # so that the squares of as many ranks as `having` holds can be summed
_RANK_BITS = 20  # for counting ranks inside one number
MOST_DOUBLINGS = 3


class Occasion(IntEnum):
    """What a vote is about."""

    WINDOW = 0
    EPOCH_END = 1
    RUN_END = 2


@dataclass(frozen=True, slots=True)
class Vote:
    """What one rank says.

    Attributes:
        occasion: the vote this is meant for.
        sequence: how many votes this engine's run has held before.
        iteration: iterations that the run has done.
        samples: for each coming iteration the samples this rank has for it; None where it has no batch.
        terminate: whether it asks for the run's end; likewise `terminate_epoch`, `interrupt` and `replace_data`.
        gave_less: whether its data ended before what it had declared.
        other_length: whether its data has another length than was agreed.
        needs_batch: whether it has never had a batch and will have to take part without one.
        unread: batches of this pass that it has not taken, and the samples in them as far as known.
        microseconds: what the last window took here.
        model_changed: whether its wrapped modules have changed, so that they are to be compared and wrapped again.
        fingerprint: of the parameters, where they are audited; else 0.
        sums: further numbers, as many on every rank, of which only the totals are wanted.
        backward_passes: how many of those that reduce gradients it has made in the run.
        counts: whether its batches and samples are counted; not where another rank of a tensor-parallel group does it.
        doublings: how many times, up to `MOST_DOUBLINGS`, the default lookahead may be doubled as far as this rank's
            memory is concerned.
    """

    occasion: Occasion
    sequence: int
    iteration: int = 0
    samples: Sequence[int | None] = ()
    terminate: bool = False
    terminate_epoch: bool = False
    interrupt: bool = False
    replace_data: bool = False
    gave_less: bool = False
    other_length: bool = False
    needs_batch: bool = False
    unread: int = 0
    microseconds: int = 0
    doublings: int = 0
    model_changed: bool = False
    backward_passes: int = 0
    fingerprint: int = 0
    sums: Sequence[int] = ()
    counts: bool = True

    @property
    def place(self) -> int:
        """A number below 2^20 that tells votes at different places of a run apart."""
        # The factor is a prime, so that votes a few iterations apart in both counts do not fall together.
        return (self.sequence * 1_000_003 + self.iteration) % (1 << _PLACE_BITS)

    def vector(self, length: int) -> list[int]:
        """The vote as `length` integers, at least `vector_length(len(self.samples), len(self.sums))`."""
        # Counted one by one: the sum tells that all ranks mean the same occasion.
        kinds = [0, 0, 0]
        kinds[self.occasion] = 1
        header = [
            *kinds,
            self.place,
            self.place**2,
            self.terminate,
            self.terminate_epoch,
            self.interrupt,
            self.replace_data,
            self.gave_less,
            self.other_length,
            self.needs_batch,
            self.unread,
            self.microseconds,
            # One count of ranks for each doubling, so that the sum over ranks tells the least of them.
            sum(1 << _RANK_BITS * at for at in range(self.doublings)),
            self.model_changed,
            passes := self.backward_passes % (1 << _PLACE_BITS),
            passes**2,
            model := self.fingerprint % (1 << _PLACE_BITS),
            model**2,
        ]
        body = [0 if n is None or not self.counts else 1 << _SAMPLE_BITS | n for n in self.samples]
        padding = [0] * (length - len(header) - len(body) - len(self.sums))
        return [*map(int, header), *body, *padding, *self.sums]


@dataclass(frozen=True, slots=True)
class VoteResult:
    """What all ranks said together: sums of the votes' fields.

    `having[i]` is the number of ranks with a batch for the i-th coming iteration, `samples[i]` what they hold.
    """

    sums: tuple[int, ...]
    occasions: tuple[int, int, int]
    having: tuple[int, ...]
    samples: tuple[int, ...]
    places: int
    squares: int
    terminate: int
    terminate_epoch: int
    interrupt: int
    replace_data: int
    gave_less: int
    other_length: int
    needs_batch: int
    unread: int
    microseconds: int
    doublings: int
    model_changed: int
    backward_passes: int
    backward_squares: int
    fingerprints: int
    fingerprint_squares: int

    def is_for(self, vote: Vote, world_size: int) -> bool:
        """Whether all ranks came to the vote that `vote` was meant for."""
        same_occasion = self.occasions[vote.occasion] == world_size
        return same_occasion and _gave_one_number(self.places, self.squares, world_size)

    def same_backward_passes(self, world_size: int) -> bool:
        """Whether all ranks have made the same number of backward passes that reduce gradients."""
        return _gave_one_number(self.backward_passes, self.backward_squares, world_size)

    def same_fingerprints(self, world_size: int) -> bool:
        """Whether the models of all ranks are the same, as far as this vote tells."""
        return _gave_one_number(self.fingerprints, self.fingerprint_squares, world_size)

    def least_doublings(self, world_size: int) -> int:
        """How many times the default lookahead may be doubled as far as all ranks are concerned."""
        counts = [self.doublings >> _RANK_BITS * at & (1 << _RANK_BITS) - 1 for at in range(MOST_DOUBLINGS)]
        return sum(count == world_size for count in counts)

    @property
    def requests(self) -> int:
        """How many requests to change the run's course were made."""
        return self.terminate + self.terminate_epoch + self.interrupt + self.replace_data


def vector_length(iterations: int, sums: int = 0) -> int:
    """Length of the vectors of votes on up to `iterations` iterations that carry `sums` further numbers."""
    return _HEADER + iterations + sums


def read_result(vector: Sequence[int], iterations: int, sums: int = 0) -> VoteResult:
    """Read the sum of all ranks' vectors, of a vote on `iterations` iterations that carries `sums` numbers."""
    window, epoch_end, run_end, *header = vector[:_HEADER]
    body = vector[_HEADER : _HEADER + iterations]
    having, samples = tuple(v >> _SAMPLE_BITS for v in body), tuple(v & _SAMPLES for v in body)
    # Numbers come last, behind what a shorter window leaves empty.
    further = tuple(vector[len(vector) - sums :])
    return VoteResult(further, (window, epoch_end, run_end), having, samples, *header)


def _gave_one_number(total: int, squares: int, world_size: int) -> bool:
    """Whether all ranks gave the same number, by the sum of their numbers and that of the squares."""
    return squares * world_size == total**2
