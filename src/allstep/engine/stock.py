"""What one rank has to give: the batches of its pass, those that were carried over from the pass before, and a filler.

Contract: an `AgreedFeed` asks what the coming iterations hold (`look`), votes on that with the other ranks, and takes
the batches of the iterations that were agreed (`give`). It says when a pass begins and ends. A batch that was agreed
and belongs to an accumulation group which the next pass completes is carried over; one that was read and not given is
kept, for data that cannot be iterated again. Nothing here crosses ranks. What can go wrong is the reader's: data that
gives less than it declared (`gave_less`), which all ranks hear of in their next vote.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from allstep.engine.reader import Reader
from allstep.engine.source import END


class Stock:
    """A rank's batches, in the order in which its iterations take them.

    Attributes:
        filler: what a rank without a batch takes part with: the last batch that was given, or another rank's; END
            before there is one.
    """

    def __init__(self, group_size: int) -> None:
        self.filler: Any = END
        self._group_size = group_size
        self._reader: Reader | None = None
        self._carried: deque[tuple[Any, int | None]] = deque()
        self._group: list[Any] = []
        self._group_began: tuple[int, int] | None = None
        self._gave_less: str | None = None

    def begin(self, reader: Reader) -> None:
        """Take from the pass that `reader` reads, behind what was carried over."""
        self._gave_less = self.gave_less
        self._reader, self._group_began = reader, None

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

    def read_ahead(self, batches: int) -> None:
        """Let reading keep up to so many batches at hand."""
        if self._reader is not None:
            self._reader.target = batches

    def first(self) -> Any:
        """The filler, or where there is none yet the next batch, without taking it; END without either."""
        return self._reader.first() if self.filler is END and self._reader is not None else self.filler

    def give(self, iteration: int, *, begins_group: bool) -> Any:
        """This rank's batch for the next iteration, which follows on `iteration` of the run; END where it has none."""
        if begins_group:
            self._group.clear()
            if self._reader is not None:
                self._group_began = iteration, self._reader.taken
        batch = self._take()
        if batch is not END:
            self.filler = batch
            if self._group_size > 1:
                self._group.append(batch)
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
