"""`Throughput`: samples or tokens a second of all ranks, floating-point operations a second, and how much of the peak.

Contract: attached on every rank alike. Each rank counts its own batches and its own time; the sums over ranks ride in
the votes that ranks hold anyway. At an epoch's end `state.metrics` has the epoch's numbers, the same on all ranks; in
between `per_second` has those of about the last second. Time counts from the beginning of an epoch to the last of its
iterations, with what handlers do in between, and without those of the epoch's end. A batch counts once: not for ranks
that run a filler, nor when its accumulation group is done again. The count of the whole run is in the checkpoint.

What can go wrong: floating-point operations are to be counted, and the model shows none; see `rates`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from allstep.engine import Engine, Events
from allstep.engine.events import check_count
from allstep.errors import ArgumentError
from allstep.handlers.rank_totals import sum_together
from allstep.handlers.rates import KILO, RankCounts, StepFlops, own_peak_flops, rates_between
from allstep.handlers.sample_counts import UnitCount


class Throughput(UnitCount):
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

    Raises:
        ArgumentError: every is no int of at least 1, or peak not above 0.
        ArgumentTypeError: count is not callable.
    """

    def __init__(
        self,
        count: Callable[[Any], int] | None = None,
        *,
        unit: str = "samples",
        flops: bool | float = False,
        peak: float | None = None,
        every: int | None = None,
    ) -> None:
        super().__init__(count)
        check_count("every", every, 1, optional=True)
        if peak is not None and not peak > 0:
            raise ArgumentError(f"peak is {peak!r}; it must be more than 0 FLOPs a second")
        self.unit = unit
        self.every = every
        self.peak = peak
        self.total = 0
        self.per_second: float | None = None
        self._given_flops = None if isinstance(flops, bool) else float(flops)
        self._step_flops = StepFlops(lambda: self.in_batch, unit) if flops is True else None

    @property
    def flops_per_unit(self) -> float | None:
        """FLOPs on this rank for one sample, or whatever is counted. Where ranks differ, "TFLOP/s" takes the mean."""
        return self._given_flops if self._step_flops is None else self._step_flops.per_unit

    def attach(self, engine: Engine) -> Throughput:
        """Measure the runs of `engine`. Returns self."""
        super().attach(engine)
        if self._step_flops is not None:
            self._step_flops.attach(engine)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
        if self.every is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self._report)
        sum_together(engine, f"Throughput of {self.unit}", RankCounts._fields, self._read, self._land)
        return self

    def _start(self, engine: Engine) -> None:
        self._ranks = engine.coordinator.world_size
        self._is_twin = engine.coordinator.data.is_twin  # a batch that several ranks compute together is one
        self._seconds, self.per_second = 0.0, None
        self._since: float | None = None  # when time was read last; None between epochs
        # Alone nobody votes, so that nothing lands before the epoch's end.
        self._now = self._epoch_from = RankCounts(self.in_run, 0, 0, 0) if self._ranks == 1 else None
        self._before: RankCounts | None = None
        if self.peak is None and (self._step_flops is not None or self._given_flops):
            self.peak = own_peak_flops()

    def _begin_epoch(self) -> None:
        self._since = time.perf_counter()

    def _end_epoch(self, engine: Engine) -> None:
        self._since = None  # what other handlers of the epoch's end took since the last reading is left out
        engine.state.metrics.update(self._rates_since(self._epoch_from))
        self._epoch_from = self._now

    def _read(self) -> dict[str, int]:
        if self._since is not None:
            since, self._since = self._since, time.perf_counter()
            self._seconds += self._since - since
        units, microseconds = 0 if self._is_twin else self.in_run, round(self._seconds * 1e6)
        flops = self.flops_per_unit
        known = (0, 0) if flops is None else (max(1, round(flops / KILO)), 1)
        return RankCounts(units, microseconds, *known)._asdict()

    def _land(self, totals: dict[str, int]) -> None:
        self._before, self._now = self._now, RankCounts(**totals)
        self._epoch_from = self._epoch_from or self._now
        self.total = self._now.units
        self.per_second = self._rates_since(self._before).get(f"{self.unit}/s", self.per_second)

    def _report(self, engine: Engine) -> None:
        if self._ranks == 1:
            self._land(self._read())
        engine.state.metrics.update(self._rates_since(self._before))

    def _rates_since(self, before: RankCounts | None) -> dict[str, float]:
        if before is None or self._now is None:
            return {}
        return rates_between(before, self._now, self.unit, self._ranks, flops=self._given_flops, peak=self.peak)
