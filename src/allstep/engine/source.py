"""One data of a run: its iterator, where a pass over it begins, and what is put back in front of it.

Contract: `Passes` makes one `Source` for each data it is given. `open` begins a pass, at its first batch or inside it;
a pass longer than an epoch goes on in the next. Samplers and datasets are told the epoch before iteration begins. What
can go wrong: the data gives nothing, or fewer batches than a continued run has consumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

from torch.utils.data import DataLoader

from allstep.data.compositions import hook_of, is_one_shot, tell_data_epoch
from allstep.data.loader import warn_of_dropping
from allstep.data.worker_passes import PersistentPass, begin_pass
from allstep.engine.filler import apart
from allstep.errors import DataError

# Stands for "no more batches", or "none given": None is a batch like any other.
END: Any = object()


class Source:
    """Passes over `data`; None is an endless series of None. `iterate` is called in place of `iter`."""

    def __init__(self, data: Any, iterate: Callable[[Any], Iterator[Any]] = iter) -> None:
        self.data = data
        self._iterate = iterate
        self.batches: Iterator[Any] | None = None
        self._pass: Iterator[Any] | None = None

    @property
    def is_one_shot(self) -> bool:
        """Whether the data is an iterator, so that what it gave is gone."""
        return is_one_shot(self.data)

    def set_epoch(self, epoch: int) -> None:
        """Tell the data, or its sampler, that epoch `epoch`, counted from 0, begins."""
        tell_data_epoch(self.data, epoch)

    @property
    def given(self) -> int:
        """Batches that a one-shot iterator gave, without those that were put back."""
        return self.batches.given if isinstance(self.batches, _PutBackIterator) else 0

    def put_back(self, batches: list[Any]) -> None:
        """Give these before anything else: they were read from a one-shot iterator and not used."""
        if self.batches is None:
            self.batches = _PutBackIterator(self._iterate(self.data))
        assert isinstance(self.batches, _PutBackIterator)
        self.batches.returned.extendleft(reversed(batches))

    def unused(self, *, last_is_undone: bool) -> list[Any]:
        """What was read from a one-shot iterator and not used; with its last batch, if the step of that is undone."""
        if not isinstance(self.batches, _PutBackIterator):
            return []
        return [*([self.batches.last] if last_is_undone else []), *self.batches.returned]

    def open(self, skip: int = 0, *, may_end: bool = False) -> None:
        """Begin a pass, `skip` batches into it: at once where data can be told, else by reading and dropping them.

        `may_end` says that the data may be shorter: another rank's is longer.

        Raises:
            DataError: the data has no batch, or ends before `skip` batches.
        """
        hook = hook_of(self.data, "skip_batches") if skip else None
        if hook is not None:
            hook(skip)
        if not self.is_one_shot:
            self.batches = repeat(None) if self.data is None else self._begin()
        elif self.batches is None:  # it cannot be begun again, and what was put back is in front of it
            self.batches = _PutBackIterator(self._iterate(self.data))
        assert self.batches is not None
        if hook is None:
            if skip and not isinstance(self.data, Sequence):
                warn_of_dropping(skip, self.data)
            for done in range(skip):
                if next(self.batches, END) is END:
                    if may_end:
                        return
                    raise DataError(
                        f"data ended after {done} batches, but the run to continue has consumed {skip} of this epoch; "
                        "give the data that it was started with"
                    )

    def _begin(self) -> Iterator[Any]:
        """A pass over data that can be begun again, in place of the last one."""
        if isinstance(self._pass, PersistentPass):
            self._pass.is_over = True  # where an epoch ended by count, its end was not read
        data = self.data
        self._pass = begin_pass(data, self._iterate) if isinstance(data, DataLoader) else self._iterate(data)
        return self._pass

    def has_more(self) -> bool:
        """Whether a one-shot iterator has another batch, which is read now and kept to be given next."""
        assert isinstance(self.batches, _PutBackIterator)
        first = next(self.batches, END)
        if first is END:
            return False
        self.batches.given -= 1
        self.batches.returned.appendleft(first)
        return True


class _PutBackIterator:
    """An iterator that takes items back and gives them again before it goes on.

    Attributes:
        returned: the items that were taken back.
        given: how many items it gave.
        last: the one that it gave last; its step may fail, and is done again with it.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self.returned: deque[Any] = deque()
        self.given = 0
        self.last: Any = END

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.last = END  # not kept alive while the next is made
        item = self.returned.popleft() if self.returned else next(self._iterator)
        self.last = apart(item)  # the step owns what it is given
        self.given += 1
        return item


def pass_position(
    iteration: int,
    epoch_began_at: int,
    epoch_length: int | None,
    epoch: int,
    length: int | None,
    *,
    passes_began_at: int = 0,
) -> tuple[int, int]:
    """The epoch, from 0, in which the pass that holds the next batch began, and the batches of that pass consumed.

    An epoch is one pass unless `epoch_length` differs from the data's length; then passes run on across epochs, and
    `iteration` alone tells the place. An epoch that was cut short begins a new series of passes.

    Args:
        iteration: iterations done in the whole run.
        epoch_began_at: iterations done when the epoch to continue began.
        epoch_length: iterations in an epoch, None while unknown.
        epoch: the epoch to continue, from 0.
        length: batches in a pass over the data, None when it does not know.
        passes_began_at: iterations done when the first pass of the present series began.
    """
    done = iteration - epoch_began_at
    if not length or length == epoch_length:
        return epoch, done
    if epoch_length is None or passes_began_at > epoch_began_at:
        return epoch, done % length
    offset = (iteration - passes_began_at) % length
    before = epoch_began_at - (iteration - offset)  # iterations of the pass that came before this epoch
    return epoch - max(0, -(-before // epoch_length)), offset
