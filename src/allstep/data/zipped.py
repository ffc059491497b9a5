"""Several loaders read side by side, or one after another, as one data: with epochs, a length and a place to go on at.

Contract: `zip_loaders` makes a `ZippedLoaders`, which an Engine is given like a loader. The engine tells it the epoch,
which every loader in it is told, and goes on inside an epoch with `skip_batches`, at once where each loader can. What a
pass yields is settled when it begins. A loader that begins again within an epoch has another order then: that of epoch
`epoch + n * 1_000_000` in its n-th repetition.

What can go wrong: a loader has no batch; an epoch's last batch has fewer samples than there are ranks, so that some
ranks would have a part of one loader and none of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from allstep.data.compositions import hook_of, tell_data_epoch
from allstep.data.loader import warn_of_dropping
from allstep.data.sampler import ShardedBatchSampler
from allstep.errors import DataError

ZipMode = Literal["min", "max_cycle", "sequential"]
_MODES = ("min", "max_cycle", "sequential")
_CYCLE = 1_000_000  # more epochs than anybody trains, so that no repetition has the order of another epoch
_END: Any = object()


def zip_loaders(*loaders: Any, mode: ZipMode = "min", **named: Any) -> ZippedLoaders:
    """Read several loaders as one.

    Args:
        loaders: those of `world.loader`, or any data that can be iterated again. Batches come as a tuple.
        mode: what ends an epoch. "min": the first loader that ends. "max_cycle": the last one, while the others begin
            again. "sequential": the loaders are read one after another; batches come as (number or name, batch).
        named: loaders by name, in place of the others. Batches come as a dict.

    Raises:
        DataError: no loader, loaders of both kinds, an unknown mode, or a last batch that does not reach all ranks.
    """
    if bool(loaders) == bool(named):
        raise DataError("zip_loaders needs loaders, either all by position or all by name")
    if mode not in _MODES:
        raise DataError(f"mode is {mode!r}; it must be one of {', '.join(_MODES)}")
    numbered: dict[Any, Any] = dict(enumerate(loaders))
    return ZippedLoaders(named or numbered, mode, tuple if loaders else dict)


class ZippedLoaders:
    """What `zip_loaders` makes. `loaders` are those in it, by number or name; `epoch` is that of the next pass."""

    def __init__(self, loaders: Mapping[Any, Any], mode: ZipMode, form: type[tuple[Any, ...]] | type[dict[Any, Any]]):
        self.loaders = dict(loaders)
        self.mode = mode
        self.epoch = 0
        self._form = form
        self._skip = 0
        self._check_tails()

    def __len__(self) -> int:
        lengths = [len(loader) for loader in self.loaders.values()]
        if self.mode == "sequential":
            return sum(lengths)
        return min(lengths) if self.mode == "min" else max(lengths)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is of this epoch (counted from 0). Another epoch than before begins at its first batch."""
        if epoch != self.epoch:
            self.epoch, self._skip = epoch, 0
        for loader in self.loaders.values():
            tell_data_epoch(loader, epoch)

    def skip_batches(self, count: int) -> None:
        """The next pass, and only that, begins at batch `count` of the epoch."""
        if count < 0:
            raise DataError(f"skip_batches({count}): give 0 or more")
        self._skip = count

    def __iter__(self) -> Iterator[Any]:
        self._check_tails()
        skip, self._skip = self._skip, 0
        if self.mode == "sequential":
            return self._one_after_another(self.epoch, skip)
        # Opened now, so that a later set_epoch is none of theirs.
        repeats = self.mode == "max_cycle"
        cycles = {name: _Cycles(loader, self.epoch, skip, repeats) for name, loader in self.loaders.items()}
        return self._side_by_side(cycles)

    def _side_by_side(self, cycles: Mapping[Any, _Cycles]) -> Iterator[Any]:
        while self.mode == "min" or not all(each.has_ended for each in cycles.values()):
            batch: dict[Any, Any] = {}
            for name, each in cycles.items():
                part = each.next()
                if part is _END:
                    if self.mode == "min" or all(other.has_ended for other in cycles.values()):
                        return
                    part = each.begin_again()
                batch[name] = part
            yield batch if self._form is dict else tuple(batch.values())

    def _one_after_another(self, epoch: int, skip: int) -> Iterator[Any]:
        for name, loader in self.loaders.items():
            length = len(loader) if skip else 0
            if skip and skip >= length:
                skip -= length
                continue
            for part in _opened(loader, epoch, skip):
                yield name, part
            skip = 0

    def _check_tails(self) -> None:
        for name, loader in self.loaders.items():
            sampler = getattr(loader, "batch_sampler", None)
            if not isinstance(sampler, ShardedBatchSampler) or not sampler.global_length:
                continue
            if not sampler.counts(sampler.global_length - 1).all():
                raise DataError(
                    f"loader {name!r} has fewer samples in its last batch than there are ranks, so that some would "
                    "have a part of one loader and none of this; make it with drop_last=True or another batch size"
                )


class _Cycles:
    """One loader in a pass, which begins again as often as is asked. `has_ended` once it has given all of it."""

    def __init__(self, loader: Any, epoch: int, skip: int, repeats: bool) -> None:
        self._loader = loader
        self._epoch = epoch
        self._cycle, rest = divmod(skip, len(loader)) if skip and repeats else (0, skip)
        self.has_ended = self._cycle > 0
        self._batches = _opened(loader, epoch + self._cycle * _CYCLE, rest)

    def next(self) -> Any:
        batch = next(self._batches, _END)
        self.has_ended = self.has_ended or batch is _END
        return batch

    def begin_again(self) -> Any:
        """The first batch of the next repetition."""
        self._cycle += 1
        self._batches = _opened(self._loader, self._epoch + self._cycle * _CYCLE, 0)
        batch = next(self._batches, _END)
        if batch is _END:
            raise DataError(f"{type(self._loader).__name__} gave no batch, and is to be read again and again")
        return batch


def _opened(loader: Any, epoch: int, skip: int) -> Iterator[Any]:
    """A pass over a loader, `skip` batches into it."""
    tell_data_epoch(loader, epoch)
    hook: Callable[[int], object] | None = hook_of(loader, "skip_batches") if skip else None
    if hook is not None:
        hook(skip)
    batches: Iterator[Any] = iter(loader)
    if hook is None and skip:
        warn_of_dropping(skip, loader)
        for _ in range(skip):
            next(batches, _END)
    return batches
