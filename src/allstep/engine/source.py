"""One data of a run: its iterator, where a pass over it begins, and what is put back in front of it.

Contract: `Passes` makes one `Source` for each data it is given. `open` begins a pass, at its first batch or inside it;
a pass longer than an epoch goes on in the next. Samplers are told the epoch before iteration begins. What can go wrong:
the data gives nothing, or fewer batches than a continued run has consumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

from allstep.data.loader import warn_of_dropping
from allstep.errors import DataError

# Stands for "no more batches", or "none given": None is a batch like any other.
END: Any = object()


class Source:
    """Passes over `data`; None is an endless series of None. `iterate` is called in place of `iter`."""

    def __init__(self, data: Any, iterate: Callable[[Any], Iterator[Any]] = iter) -> None:
        self.data = data
        self._iterate = iterate
        self._iterator: Iterator[Any] | None = None
        self.batches: Iterator[Any] | None = None

    @property
    def is_one_shot(self) -> bool:
        """Whether the data is an iterator, so that what it gave is gone."""
        return hasattr(self.data, "__next__")

    def set_epoch(self, epoch: int) -> None:
        """Tell the data, or its sampler, that epoch `epoch`, counted from 0, begins."""
        hook = _hook(self.data, "set_epoch")
        if hook is not None:
            hook(epoch)

    def put_back(self, batches: list[Any]) -> None:
        """Give these before anything else: they were read from a one-shot iterator and not used."""
        # The wrapper stays for the data's life: an iterator cannot be begun again, so it can never be dropped.
        if not isinstance(self.batches, _PutBackIterator):
            self._iterator = self.batches = _PutBackIterator(
                self._iterate(self.data) if self.batches is None else self.batches
            )
        self.batches.returned.extendleft(reversed(batches))

    def open(self, skip: int = 0, *, may_end: bool = False) -> None:
        """Begin a pass, `skip` batches into it: at once where data can be told, else by reading and dropping them.

        `may_end` says that the data may be shorter: another rank's is longer.

        Raises:
            DataError: the data has no batch, or ends before `skip` batches.
        """
        hook = _hook(self.data, "skip_batches") if skip else None
        if hook is not None:
            hook(skip)
        if not (self.is_one_shot and self.batches):  # else a batch that `has_more` keeps would be lost
            self._iterator = repeat(None) if self.data is None else self._iterate(self.data)
            self.batches = self._iterator
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

    def has_more(self) -> bool:
        """Whether the pass has another batch, which is read now and kept to be given next."""
        assert self.batches is not None
        assert self._iterator is not None
        first = next(self.batches, END)
        if first is END:
            return False
        self.batches = chain((first,), self._iterator)
        return True


class _PutBackIterator:
    """An iterator that takes items back and gives them again before it goes on."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self.returned: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.returned.popleft() if self.returned else next(self._iterator)


def pass_position(
    iteration: int, epoch_began_at: int, epoch_length: int | None, epoch: int, length: int | None
) -> tuple[int, int]:
    """The epoch, from 0, in which the pass that holds the next batch began, and the batches of that pass consumed.

    An epoch is one pass unless `epoch_length` differs from the data's length; then passes run on across epochs, and
    `iteration` alone tells the place, provided that no epoch was cut short.

    Args:
        iteration: iterations done in the whole run.
        epoch_began_at: iterations done when the epoch to continue began.
        epoch_length: iterations in an epoch, None while unknown.
        epoch: the epoch to continue, from 0.
        length: batches in a pass over the data, None when it does not know.
    """
    done = iteration - epoch_began_at
    if not length or length == epoch_length:
        return epoch, done
    if epoch_length is not None and epoch_began_at == epoch * epoch_length:
        passes, offset = divmod(iteration, length)
        return passes * length // epoch_length, offset
    return epoch, done % length


def _hook(data: Any, name: str) -> Callable[[int], object] | None:
    # The data itself first, then from the outside in: a batch sampler may hand the call on to the sampler it wraps.
    batch_sampler = getattr(data, "batch_sampler", None)
    for owner in (data, batch_sampler, getattr(batch_sampler, "sampler", None), getattr(data, "sampler", None)):
        hook = getattr(owner, name, None)
        if callable(hook):
            return hook  # type: ignore[no-any-return]
    return None
