"""`Throughput`: samples or tokens a second of all ranks, floating-point operations a second, and how much of the peak.

Contract: attached on every rank alike. Each rank counts its own batches and its own time; the sums over ranks ride in
the votes that ranks hold anyway. At an epoch's end `state.metrics` has the epoch's numbers, the same on all ranks; in
between `per_second` has those of about the last second. Time counts from the beginning of an epoch to the last of its
iterations, with what handlers do in between, and without those of the epoch's end. A batch counts once: not for ranks
that run a filler, nor when its accumulation group is done again. The count of the whole run is in the checkpoint.

FLOPs are counted once, in the first iteration in which this rank has a batch, by torch's FlopCounterMode: what matrix
products, convolutions and attention in that step do, backward included, whatever it is done for; a model that
recomputes activations counts that too. What can go wrong: a compiled model shows no operations, so nothing is counted
and the log says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from allstep.engine import Engine, Events
from allstep.engine.events import is_count
from allstep.errors import ArgumentError, ArgumentTypeError
from allstep.handlers.device_peaks import peak_flops
from allstep.world import World, current_data_ranks

_KILO = 1000


class _Totals(NamedTuple):
    """Sums over all ranks."""

    units: int
    microseconds: int
    kiloflops: int  # of one unit
    ranks_with_flops: int


class Throughput:
    """Measures how fast a run goes.

    Args:
        count: `batch -> int`, such as the tokens in it; by default samples are counted.
        unit: what is counted, for the name of the number in `state.metrics`: "samples/s".
        flops: floating-point operations for one sample, or whatever is counted; True has torch count them.
        peak: FLOPs a second of one device at most; by default from a table of devices, for bf16.
        every: set the numbers of the last second in `state.metrics` every so many iterations, besides an epoch's.

    Attributes:
        total: samples, or what is counted, of all ranks in the whole run, as of about a second ago.
        per_second: of all ranks, over about the last second; alone, since the last report. None at first.
        flops_per_unit: on this rank, for one sample or what is counted; None while unknown. Where ranks differ,
            "TFLOP/s" takes the mean.

    Raises:
        ArgumentError: every is no int of at least 1, or peak not above 0.
        ArgumentTypeError: count is not callable.
    """

    state_differs_by_rank = True

    def __init__(
        self,
        count: Callable[[Any], int] | None = None,
        *,
        unit: str = "samples",
        flops: bool | float = False,
        peak: float | None = None,
        every: int | None = None,
    ) -> None:
        if count is not None and not callable(count):
            raise ArgumentTypeError(f"count is {count!r}; it must be a function of a batch")
        if every is not None and not is_count(every, least=1):
            raise ArgumentError(f"every is {every!r}; it must be an int of at least 1")
        if peak is not None and not peak > 0:
            raise ArgumentError(f"peak is {peak!r}; it must be more than 0 FLOPs a second")
        self.count = count
        self.unit = unit
        self.every = every
        self.peak = peak
        self.flops_per_unit = None if isinstance(flops, bool) else float(flops)
        self.total = 0
        self.per_second: float | None = None
        self._counts_flops = flops is True
        self._flop_counter: FlopCounterMode | None = None
        self._units = 0  # of this rank, in the whole run
        self._counted_until = 0  # the iteration
        self._seconds = 0.0  # in epochs, before the present one
        self._epoch_began: float | None = None
        self._read_at = 0.0
        self._landed: list[int] = []
        self._now: _Totals | None = None
        self._before: _Totals | None = None
        self._epoch_from: _Totals | None = None

    def attach(self, engine: Engine) -> Throughput:
        """Measure the runs of `engine`. Returns self."""
        extension = engine.extension
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin_epoch)
        if self._counts_flops:
            engine.add_event_handler(Events.ITERATION_STARTED, self._begin_flops)
            engine.add_event_handler(Events.EXCEPTION_RAISED, self._drop_flops)
        if self.count is None:
            extension.count_samples()
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._count_samples)
        else:  # before the step, which may change its batch
            engine.add_event_handler(Events.ITERATION_STARTED, self._count_batch)
        if self._counts_flops:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._end_flops)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
        if self.every is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self._report)
        for name, read in self._numbers(engine).items():
            extension.sum_over_ranks(f"{name} of Throughput", read, self._land)
        extension.add_state(self)
        return self

    # What this rank does in each iteration

    def _count_samples(self, engine: Engine) -> None:
        state = engine.state
        if state.iteration > self._counted_until:
            self._counted_until = state.iteration
            self._units += state.samples or 0

    def _count_batch(self, engine: Engine) -> None:
        state = engine.state
        if state.iteration > self._counted_until:
            self._counted_until = state.iteration
            if state.active and self.count is not None:
                self._units += int(self.count(state.batch))

    def _begin_flops(self, engine: Engine) -> None:
        if self._flop_counter is None and engine.state.active:
            self._units_before = self._units
            self._flop_counter = FlopCounterMode(display=False)
            self._flop_counter.__enter__()  # type: ignore[no-untyped-call]

    def _end_flops(self, engine: Engine) -> None:
        if self._flop_counter is None:
            return
        counted, units = self._drop_flops(), self._units - self._units_before
        if units <= 0:
            return
        if counted:
            self.flops_per_unit = counted / units
        else:
            engine.logger.warning(
                "no floating-point operation was counted in iteration %d, as with a compiled model: give "
                "Throughput(flops=...) their number for one of %s",
                engine.state.iteration,
                self.unit,
            )
        # Counted once: the step is slower meanwhile, and each further call costs an iteration something.
        engine.remove_event_handler(self._begin_flops, Events.ITERATION_STARTED)
        engine.remove_event_handler(self._end_flops, Events.ITERATION_COMPLETED)

    def _drop_flops(self, *_: Any) -> int:
        counter, self._flop_counter = self._flop_counter, None
        if counter is None:
            return 0
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return int(counter.get_total_flops())

    # What is summed over ranks

    def _microseconds(self) -> int:
        self._read_at = time.perf_counter()
        began = self._read_at if self._epoch_began is None else self._epoch_began
        return round((self._seconds + self._read_at - began) * 1e6)

    def _numbers(self, engine: Engine) -> dict[str, Callable[[], int]]:
        return {
            # A batch that several ranks compute together is one.
            self.unit: lambda: 0 if engine.coordinator.data.is_twin else self._units,
            "microseconds": self._microseconds,
            "kFLOPs": lambda: 0 if self.flops_per_unit is None else max(1, round(self.flops_per_unit / _KILO)),
            "ranks with FLOPs": lambda: int(self.flops_per_unit is not None),
        }

    def _land(self, total: int) -> None:
        self._landed.append(total)
        if len(self._landed) < len(_Totals._fields):
            return
        totals = _Totals(*self._landed)
        self._landed.clear()
        self._before, self._now, self.total = self._now, totals, totals.units
        self._epoch_from = self._epoch_from or totals
        if self._before is not None:
            self.per_second = self._rates(self._before).get(f"{self.unit}/s", self.per_second)

    # When

    def _start(self, engine: Engine) -> None:
        if engine.state.iteration == 0:
            self._units, self._counted_until = 0, 0
        self._world_size = engine.coordinator.world_size
        self._seconds, self._epoch_began = 0.0, None
        self._landed.clear()
        self._now = self._before = self._epoch_from = self.per_second = None
        if self.peak is None and (self._counts_flops or self.flops_per_unit):
            world = World.current()
            device = torch.device("cpu") if world is None else world.device
            self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if self._world_size == 1:  # nobody votes, so that nothing lands before the epoch's end
            self._now = self._epoch_from = _Totals(self._units, 0, 0, 0)

    def _begin_epoch(self) -> None:
        self._close_epoch()
        self._epoch_began = time.perf_counter()

    def _end_epoch(self, engine: Engine) -> None:
        self._close_epoch()
        if self._epoch_from is not None:
            engine.state.metrics.update(self._rates(self._epoch_from))
        self._epoch_from = self._now

    def _close_epoch(self) -> None:
        """Count the time until it was read last, which at an epoch's end is before the handlers of that."""
        if self._epoch_began is not None:
            self._seconds += max(0.0, self._read_at - self._epoch_began)
            self._epoch_began = None

    def _report(self, engine: Engine) -> None:
        if self._world_size == 1:
            for read in self._numbers(engine).values():
                self._land(read())
        if self._before is not None:
            engine.state.metrics.update(self._rates(self._before))

    def _rates(self, since: _Totals) -> dict[str, float]:
        now = self._now
        if now is None or now.microseconds <= since.microseconds:
            return {}
        seconds = (now.microseconds - since.microseconds) / 1e6 / self._world_size
        per_second = (now.units - since.units) / seconds
        rates = {f"{self.unit}/s": per_second}
        if now.ranks_with_flops:
            # A number that was given is the same everywhere, and needs no rounding.
            counted = now.kiloflops * _KILO / now.ranks_with_flops
            flops = per_second * (counted if self._counts_flops else self.flops_per_unit or 0.0)
            rates["TFLOP/s"] = flops / 1e12
            if self.peak is not None:
                rates["MFU"] = flops / (self.peak * self._world_size)
        return rates

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """How much this rank has counted in the whole run."""
        return {"units": self._units}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Raises ValueError when a key is missing."""
        if "units" not in state_dict:
            raise ArgumentError("the state of Throughput lacks units; load what state_dict() gave")
        self._units = int(state_dict["units"])

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take this rank's share of what all ranks of a checkpoint counted."""
        data = current_data_ranks()
        self._units = sum(int(each["units"]) for each in states[data.rank :: data.size])
