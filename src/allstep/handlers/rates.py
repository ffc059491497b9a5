"""How fast ranks go: rates between two moments, floating-point operations of a step, and the peaks of devices.

Contract: rates are arithmetic on what ranks had counted at each of two moments. Operations are counted by torch's
FlopCounterMode in the first iteration in which this rank has a batch: what matrix products, convolutions and attention
in that step do, backward included, whatever it is done for; a model that recomputes activations counts that too. The
step is slower meanwhile, so it is not counted again. Peaks are of one device as torch counts devices, for matrix
products in bf16 or fp16 with sums in fp32, dense, without structured sparsity, from a table of their makers' data
sheets; a part that is sold with several clocks has the number of its data sheet.

What can go wrong: a compiled model shows no operations, so nothing is counted and the log says so; a device is not in
the table, so there is no share of its peak.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.flop_counter import FlopCounterMode

from allstep.cuda import device_name
from allstep.engine import Engine, Events
from allstep.world import World

KILO = 1000


class RankCounts(NamedTuple):
    """What ranks had counted at a moment, each field a sum over the ranks.

    Attributes:
        units: samples, or whatever is counted.
        microseconds: of the ranks' time.
        kiloflops: floating-point operations for one unit in thousands, of the ranks that know them.
        ranks_with_flops: how many ranks know them.
    """

    units: int
    microseconds: int
    kiloflops: int
    ranks_with_flops: int


def rates_between(
    before: RankCounts, now: RankCounts, unit: str, ranks: int, *, flops: float | None, peak: float | None
) -> dict[str, float]:
    """Rates over all ranks, by the names that they have in results; none where no time has passed.

    Args:
        before: at the first moment.
        now: at the second moment.
        unit: what is counted.
        ranks: how many there are.
        flops: floating-point operations for one unit; None for the mean over the ranks that know them.
        peak: floating-point operations a second of one device at most, if known.

    Returns:
        "samples/s" by the unit's name, and where operations are known "TFLOP/s" and the share of the peak, "MFU".
    """
    if now.microseconds <= before.microseconds:
        return {}
    seconds = (now.microseconds - before.microseconds) / 1e6 / ranks
    rates = {f"{unit}/s": (now.units - before.units) / seconds}
    if flops is None and now.ranks_with_flops:
        flops = now.kiloflops * KILO / now.ranks_with_flops
    if flops is not None:
        per_second = flops * rates[f"{unit}/s"]
        rates["TFLOP/s"] = per_second / 1e12
        if peak is not None:
            rates["MFU"] = per_second / (peak * ranks)
    return rates


class StepFlops:
    """Counts the operations of one step of this rank.

    Args:
        units: how many samples, or whatever operations are counted for, the present batch has; asked after the step.
        unit: what these are called.

    Attributes:
        per_unit: operations for one unit; None while unknown.
    """

    def __init__(self, units: Callable[[], int], unit: str) -> None:
        self.per_unit: float | None = None
        self._units = units
        self._unit = unit
        self._counter: FlopCounterMode | None = None

    def attach(self, engine: Engine) -> StepFlops:
        """Count in a run of `engine`. Returns self."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._end)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._leave)
        return self

    def _begin(self, engine: Engine) -> None:
        if engine.state.active and self._counter is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, *_: Any) -> int:
        counter, self._counter = self._counter, None
        if counter is None:
            return 0
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return int(counter.get_total_flops())

    def _end(self, engine: Engine) -> None:
        if self._counter is None:
            return
        counted, units = self._leave(), self._units()
        if units <= 0:
            return
        if counted:
            self.per_unit = counted / units
        else:
            engine.logger.warning(
                "no floating-point operation was counted in iteration %d, as with a compiled model: give "
                "Throughput(flops=...) their number for one of %s",
                engine.state.iteration,
                self._unit,
            )
        engine.remove_event_handler(self._begin, Events.ITERATION_STARTED)  # each further call would cost something
        engine.remove_event_handler(self._end, Events.ITERATION_COMPLETED)


_TERA = 1e12

_PEAKS: tuple[tuple[str, float, str], ...] = (
    # All words of the first column are in the device's name; the first row that fits holds.
    ("GB200", 2500, "NVIDIA GB200 NVL72 data sheet: 5,000 with sparsity"),
    ("B200", 2250, "NVIDIA HGX B200 data sheet: 4,500 with sparsity"),
    ("GH200", 989, "NVIDIA GH200 data sheet: 1,979 with sparsity"),
    ("H200 NVL", 835, "NVIDIA H200 data sheet: 1,671 with sparsity"),
    ("H200", 989, "NVIDIA H200 data sheet: 1,979 with sparsity"),
    ("H100 NVL", 835, "NVIDIA H100 NVL data sheet: 1,671 with sparsity"),
    ("H100 PCIe", 756, "NVIDIA H100 data sheet: 1,513 with sparsity"),
    ("H100", 989, "NVIDIA H100 data sheet, SXM: 1,979 with sparsity"),
    ("H800", 989, "as H100 SXM, which it differs from in links and fp64"),
    ("A100", 312, "NVIDIA A100 data sheet"),
    ("A800", 312, "as A100, which it differs from in links"),
    ("A30", 165, "NVIDIA A30 data sheet"),
    ("A40", 149.7, "NVIDIA A40 data sheet"),
    ("A10", 125, "NVIDIA A10 data sheet"),
    ("L40S", 362, "NVIDIA L40S data sheet: 733 with sparsity"),
    ("L40", 181, "NVIDIA L40 data sheet"),
    ("L4", 121, "NVIDIA L4 data sheet: 242 with sparsity"),
    ("V100", 125, "NVIDIA V100 data sheet, SXM2; fp16 only"),
    ("T4", 65, "NVIDIA T4 data sheet; fp16 only"),
    ("MI355X", 2516, "AMD Instinct MI355X data sheet"),
    ("MI325X", 1307, "AMD Instinct MI325X data sheet"),
    ("MI300X", 1307, "AMD Instinct MI300X data sheet"),
    ("MI250X", 191.5, "AMD Instinct MI250X data sheet: 383 for its two dies, which torch counts as two devices"),
)
"""Words of a device's name, TFLOP/s, and where the number is from."""


def peak_flops(device_name: str) -> float | None:
    """Floating-point operations a second of a device at most, by the name that torch gives it; None if unknown."""
    words = set(re.split(r"[\s\-_/]+", device_name.lower()))
    for name, tera, _ in _PEAKS:
        if words.issuperset(name.lower().split()):
            return tera * _TERA
    return None


def own_peak_flops() -> float | None:
    """Those of this rank's device; None where it is not in the table, or no World is open."""
    world = World.current()
    if world is None or world.device.type != "cuda":
        return None
    return peak_flops(device_name(world.device))
