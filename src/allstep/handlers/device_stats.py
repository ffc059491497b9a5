"""`DeviceStats`: how busy and how full the processors, memory and devices of all ranks are.

Contract: attached on every rank alike. Each so many iterations a rank reads its own numbers, which `values` has; see
`device_readings`. At an epoch's end `state.metrics` has the mean over the ranks, under a prefix: of what was read in
the epoch the mean, and of memory the most. The sums over ranks ride in the votes that ranks hold anyway. In other
iterations it costs nothing. A number that only some ranks can read is the mean over these. What can go wrong: psutil is
not installed.
"""

from __future__ import annotations

from collections.abc import Callable

from allstep.engine import Engine, Events
from allstep.engine.events import check_count
from allstep.handlers.device_readings import DEVICE, HOST, Reading, host_reader, own_device_reader
from allstep.handlers.rank_totals import sum_together

_SCALE = 1000  # numbers travel as thousandths
_RANKS = {name: f"ranks with {name}" for name in (*HOST, *DEVICE)}
"""What it is called how many ranks have read a number."""


class DeviceStats:
    """Reads how busy and full processors, memory and devices are.

    Args:
        every: iterations between readings.
        prefix: what stands before the names in `state.metrics`.

    Attributes:
        values: this rank's last reading: "cpu_percent" of one core and "memory_gib" of this process,
            "host_memory_percent" of the host; on CUDA devices "device_allocated_gib" by torch, and of the whole device
            "device_percent" of the time busy, "device_memory_gib", "device_celsius" and "device_watts".

    Raises:
        MissingExtraError: psutil is not installed.
        ArgumentError: every is no int of at least 1.
    """

    def __init__(self, every: int = 100, *, prefix: str = "device/") -> None:
        check_count("every", every, 1)
        self.every = every
        self.prefix = prefix
        self.values: Reading = {}
        self._host = host_reader()
        self._device: Callable[[], Reading] = dict
        self._of_epoch: dict[str, list[float]] = {}
        self._totals: dict[str, int] = {}

    def attach(self, engine: Engine) -> DeviceStats:
        """Read in the runs of `engine`. Returns self."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self._take)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)
        # The same names on all ranks, whatever each of them can read.
        sum_together(engine, "DeviceStats", (*_RANKS, *_RANKS.values()), self._read, self._land)
        return self

    def _start(self) -> None:
        self._device = own_device_reader()
        self._of_epoch.clear()

    def _take(self) -> None:
        self.values = self._host() | self._device()
        for name, value in self.values.items():
            self._of_epoch.setdefault(name, []).append(value)

    def _read(self) -> dict[str, int]:
        numbers: dict[str, int] = {}
        for name, taken in self._of_epoch.items():
            number = max(taken) if name.endswith("_gib") else sum(taken) / len(taken)
            numbers |= {name: round(_SCALE * number), _RANKS[name]: 1}
        return numbers

    def _land(self, totals: dict[str, int]) -> None:
        self._totals = totals

    def _report(self, engine: Engine) -> None:
        for name, counted in _RANKS.items():
            if ranks := self._totals.get(counted):
                engine.state.metrics[f"{self.prefix}{name}"] = self._totals[name] / _SCALE / ranks
        self._of_epoch.clear()
