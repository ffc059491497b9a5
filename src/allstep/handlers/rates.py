"""How fast ranks have gone between two moments: arithmetic on what they had counted at each of them.

Contract: pure functions of numbers.
"""

from __future__ import annotations

from typing import NamedTuple

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
