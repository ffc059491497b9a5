"""One rank's batches of a pass: what it can promise beforehand, what it read ahead, and what it takes part with.

Contract: `AgreedBatches` asks a `BatchBuffer` what the coming iterations hold (`look`), votes on that with the other
ranks, and takes the batches of the iterations that were agreed (`give`). Nothing here crosses ranks.

The buffer takes the batches of a pass from a `BatchReader`. Where counts are arithmetic and each sample is a row of its
batch (allstep's own loader, or a plain `DataLoader` with torch's batch sampler, with torch's collation over a map-style
dataset) nothing is read ahead. All other data is read ahead, on the main thread, about one batch an iteration. A batch
that was agreed and belongs to an accumulation group which the next pass completes is carried over. One that was read
and not given is kept, for data that cannot be iterated again.

The step owns the batch that it is given and may change it. What is needed of one afterwards is kept apart: a filler,
and the batches of an unfinished group of data that cannot be iterated again.

What can go wrong: data gives less than it declared, or batches of other sizes (`gave_less`), which all ranks hear of in
their next vote; a batch whose samples cannot be counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

from allstep.engine.batch_sizes import BatchCounter, Counts, bytes_of, declared_counts, fetches_many
from allstep.engine.filler import KeptBatch, apart
from allstep.engine.run_plan import SamplesIn, len_of, length_of_all
from allstep.engine.source import END


class BatchReader(Protocol):
    """Batches of one pass of one rank.

    Attributes:
        gave_less: what the data declared and did not give, in words, if it did.
        target: batches that reading may keep at hand.
        taken: batches that were taken.
    """

    gave_less: str | None
    target: int
    taken: int

    def bytes_of_batch(self) -> float:
        """The most that one of the batches held takes, in bytes; infinity where nobody knows."""

    def look(self, start: int, stop: int) -> list[int | None]:
        """Samples in the batches from `start` to `stop`, counted from the next one; None where there is none."""

    def take(self) -> Any:
        """The next batch, or END where this rank has none for the iteration."""

    def first(self) -> Any:
        """The next batch without taking it, or END."""

    def unread(self) -> tuple[int, int]:
        """Batches of the pass that were not taken and the samples in them, as far as known."""

    def kept(self) -> list[Any]:
        """Batches that were read and not taken."""

    def total(self) -> tuple[int, bool]:
        """Batches in the whole pass as far as known, and whether that is all."""


class DeclaredReader:
    """Batches whose sizes are known without reading: `counts(start, stop)`, numbered from the pass's beginning.

    `length` is None for an endless series. `count` compares each batch with what was promised for it, where the dataset
    itself decides how many samples it gives.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        counts: Counts,
        length: int | None,
        position: int,
        count: BatchCounter | None = None,
    ) -> None:
        self._batches = batches
        self._counts = counts
        self._count = count
        self._length = length
        self._position = position
        self._held: list[Any] = []
        self._promised: dict[int, int | None] = {}  # by number, of batches that were not taken yet
        self.gave_less: str | None = None
        self.target = 0
        self.taken = 0

    def bytes_of_batch(self) -> float:
        """0: what is read is taken at once."""
        return 0

    def look(self, start: int, stop: int) -> list[int | None]:
        """Arithmetic."""
        first, last = self._position + start, self._position + stop
        counts = self._counts(first, last)
        # The arithmetic for one batch takes as long as that for a window, so `take` does not do it again.
        self._promised.update(zip(range(first, last), counts, strict=True))
        return counts

    def take(self) -> Any:
        """Read the next batch; END where none was promised, or the promise was not kept."""
        if self._position not in self._promised:
            self.look(0, 1)
        promised = self._promised.pop(self._position)
        # A batch that was not promised is not read either: the other ranks have no iteration for it.
        batch = (self._held.pop() if self._held else next(self._batches, END)) if promised else END
        if promised and batch is END:
            self._say_less()
        elif promised and self._count is not None:
            self._compare(self._count(batch, self._position), promised)
        self._position += 1
        self.taken += batch is not END
        return batch

    def first(self) -> Any:
        """Read the next batch and hold it."""
        if not self._held and self.look(0, 1)[0]:
            batch = next(self._batches, END)
            if batch is END:
                self._say_less()
            else:
                self._held.append(batch)
        return self._held[0] if self._held else END

    def unread(self) -> tuple[int, int]:
        """What is left of the declared length."""
        if self._length is None:
            return 0, 0
        counts = [count for count in self._counts(self._position, self._length) if count]
        return len(counts), sum(counts)

    def kept(self) -> list[Any]:
        """The batch that `first` holds, if any."""
        return list(self._held)

    def total(self) -> tuple[int, bool]:
        """The declared length."""
        return (self._position, False) if self._length is None else (self._length, True)

    def _say_less(self) -> None:
        if self.gave_less is None:
            self.gave_less = f"declared {self._length} batches and gave {self._position}"

    def _compare(self, found: int, promised: int) -> None:
        if found != promised and self.gave_less is None:
            self.gave_less = f"declared {promised} samples in batch {self._position} and gave {found}"


class AheadReader:
    """Batches that have to be read to be counted; keeps up to `target` of them, or what `look` needs.

    `count` counts them, the first of which has number `position` in its pass. `length` is how many are left, None when
    nobody knows. The pass of all ranks has at least `iterations` more: where this rank's data has ended before, it
    takes part with a batch of no sample. `bytes_besides` tells what is held for each batch besides itself.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        count: BatchCounter,
        *,
        position: int = 0,
        length: int | None = None,
        iterations: int = 0,
        bytes_besides: Callable[[], float] = lambda: 0,
    ) -> None:
        self._batches = batches
        self._bytes_besides = bytes_besides
        self._count = count
        self._begins_at = position
        self._length = length
        self._iterations = iterations
        self._position = 0
        self._read: deque[tuple[Any, int]] = deque()
        self.taken = 0
        self._ended = False
        self.gave_less: str | None = None
        self.target = 0

    def bytes_of_batch(self) -> float:
        """Measured on the batches at hand, when a vote is cast: not for each batch."""
        return max((bytes_of(batch) for batch, _ in self._read), default=0) + self._bytes_besides()

    def look(self, start: int, stop: int) -> list[int | None]:
        """Read as many batches as the answer needs."""
        self._fill(stop)
        known: list[int | None] = [samples for _, samples in islice(self._read, start, stop)]
        # Behind the end of this rank's data, but inside the pass of all, it has a batch of no sample.
        missing = range(self._position + start + len(known), self._position + stop)
        return known + [0 if at < self._iterations else None for at in missing]

    def take(self) -> Any:
        """The next batch; one more is read in its place."""
        self._fill(1)
        self._position += 1
        if not self._read:
            return END
        batch, _ = self._read.popleft()
        self.taken += 1
        # One for one, so that reading is spread over the iterations and does not all come at the end of a window.
        self._fill(min(self.target, len(self._read) + 1))
        return batch

    def first(self) -> Any:
        """The next batch, which stays."""
        self._fill(1)
        return self._read[0][0] if self._read else END

    def unread(self) -> tuple[int, int]:
        """What was read ahead, and of a declared length also the batches that would follow, not counted yet."""
        left = len(self._read)
        # len() counts what was not read yet; once the end was read, it may have been wrong.
        if self._length is not None and not self._ended:
            left = max(left, self._length - self.taken)
        return left, sum(samples for _, samples in self._read)

    def kept(self) -> list[Any]:
        """All that was read ahead."""
        return [batch for batch, _ in self._read]

    def total(self) -> tuple[int, bool]:
        """What was taken and what was read ahead."""
        return self.taken + len(self._read), self._ended

    def _fill(self, target: int) -> None:
        while len(self._read) < target and not self._ended:
            batch = next(self._batches, END)
            if batch is END:
                self._ended = True
            else:
                number = self._begins_at + self.taken + len(self._read)
                self._read.append((batch, self._count(batch, number)))


def make_reader(
    data: Any,
    batches: Iterator[Any],
    position: int,
    samples_in: SamplesIn | None,
    bytes_besides: Callable[[], float] = lambda: 0,
) -> BatchReader:
    """The reader for a pass over `data` that stands at batch `position`."""
    declared = declared_counts(data) if samples_in is None else None
    count = BatchCounter(data, samples_in)
    if declared is None:
        of_rank = getattr(getattr(data, "batch_sampler", None), "batches_of_rank", len_of(data))
        return AheadReader(
            batches,
            count,
            position=position,
            length=None if of_rank is None else max(0, of_rank - position),
            iterations=(length_of_all(data) or 0) - position,
            bytes_besides=bytes_besides,
        )
    counts, length = declared
    return DeclaredReader(batches, counts, length, position, count if fetches_many(data) else None)


class BatchBuffer:
    """A rank's batches, in the order in which its iterations take them.

    A filler is what a rank without a batch takes part with: the first batch with a sample that it was given in a pass,
    as it was then, or another rank's.
    """

    def __init__(self, group_size: int) -> None:
        self._filler: KeptBatch | None = None
        self._keeps_filler = True
        self._keeps_group = False
        self._group_size = group_size
        self._reader: BatchReader | None = None
        self._carried: deque[tuple[Any, int | None]] = deque()
        self._group: list[Any] = []
        self._group_began: tuple[int, int] | None = None
        self._gave_less: str | None = None

    def begin(self, reader: BatchReader, *, is_one_shot: bool) -> None:
        """Take from the pass that `reader` reads, behind what was carried over.

        `is_one_shot` says that the data cannot be iterated again, so that the batches of a group, or of an iteration,
        are kept until its steps are done.
        """
        self._gave_less = self.gave_less
        self._reader, self._group_began = reader, None
        self._keeps_group = is_one_shot
        self._keeps_filler = True  # other data may have begun, whose batches are made differently

    @property
    def has_filler(self) -> bool:
        """Whether this rank can take part without a batch."""
        return self._filler is not None

    def filler(self) -> Any:
        """A batch to take part with, which the step may change like any other; END before there is one."""
        return END if self._filler is None else self._filler.copy()

    def keep_filler(self, batch: Any) -> None:
        """Take part with `batch` from now on."""
        self._filler = KeptBatch(batch)

    @property
    def carried(self) -> int:
        """Batches that were carried over and not given."""
        return len(self._carried)

    @property
    def gave_less(self) -> str | None:
        """What this rank's data declared and did not give, in words, if it did."""
        return self._gave_less or (self._reader.gave_less if self._reader is not None else None)

    def look(self, start: int, stop: int) -> list[int | None]:
        """Samples in the batches from `start` to `stop`, counted from the next one; None where there is none."""
        assert self._reader is not None
        carried = len(self._carried)
        known = [samples for _, samples in list(self._carried)[start:stop]]
        return known + self._reader.look(max(start - carried, 0), max(stop - carried, 0))

    def bytes_of_batch(self) -> float:
        """The most that one of the batches held takes, in bytes; infinity where nobody knows."""
        return self._reader.bytes_of_batch() if self._reader is not None else 0

    def read_ahead(self, batches: int) -> None:
        """Let reading keep up to so many batches at hand."""
        if self._reader is not None:
            self._reader.target = batches

    def first(self) -> Any:
        """A filler, or where there is none yet the next batch, without taking it; END without either."""
        return self._reader.first() if self._filler is None and self._reader is not None else self.filler()

    def give(self, iteration: int, samples: int, *, begins_group: bool) -> Any:
        """This rank's batch for the next iteration, which follows on `iteration` of the run; END where it has none.

        `samples` is what was agreed that it holds.
        """
        if begins_group:
            # Kept until the group is complete: if the run ends inside it, its gradients are lost and it is run again.
            self._group.clear()
            if self._reader is not None:
                self._group_began = iteration, self._reader.taken
        batch = self._take()
        if batch is not END:
            if self._filler is None or (samples and self._keeps_filler):
                self._filler, self._keeps_filler = KeptBatch(batch), not samples
            if self._keeps_group:
                self._group.append(apart(batch))
        return batch

    def carry_over(self, samples: list[int | None]) -> None:
        """Keep the next batches, of so many samples each, for the group that the next pass completes."""
        self._carried.extend([(self._take(), count) for count in samples])

    def kept(self) -> list[Any]:
        """Batches of the pass that were read and neither given nor carried over."""
        return self._reader.kept() if self._reader is not None else []

    def abandon(self, *, group_is_undone: bool) -> list[Any]:
        """All that was read and not given, or given to a group that is undone; nothing is carried over any more."""
        carried = [batch for batch, _ in self._carried if batch is not END]
        self._carried.clear()
        return (list(self._group) if group_is_undone else []) + carried + self.kept()

    def taken_by(self, iteration: int) -> int | None:
        """Batches taken from the pass in the first `iteration` iterations of the run, which end a group."""
        if self._reader is None:
            return None
        if self._group_began is not None and self._group_began[0] >= iteration:
            return self._group_began[1]
        return self._reader.taken

    def unread(self) -> tuple[int, int]:
        """Batches that were not given and the samples in them, as far as known."""
        batches, samples = self.unread_of_pass()
        carried = [count for _, count in self._carried if count is not None]
        return batches + len(carried), samples + sum(carried)

    def unread_of_pass(self) -> tuple[int, int]:
        """The same without what was carried over."""
        return self._reader.unread() if self._reader is not None else (0, 0)

    def total(self) -> tuple[int, bool]:
        """Batches in the pass as far as known, and whether that is all."""
        return self._reader.total() if self._reader is not None else (0, True)

    def _take(self) -> Any:
        if self._carried:
            return self._carried.popleft()[0]
        assert self._reader is not None
        return self._reader.take()
