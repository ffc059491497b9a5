"""A curve: numbers one after another, smoothed; where it falls fastest; and as a picture.

Contract: pure arithmetic. A picture is SVG, which every browser and notebook shows; points that are not finite are left
out. What a finder returns has such a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 20, 24, 56
_TICKS = 5


class CurvePicture:
    """What has a picture; a notebook shows it."""

    def svg(self) -> str:
        """The picture, as SVG."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write the picture to an .svg file."""
        Path(path).write_text(self.svg(), encoding="utf-8")

    def _repr_svg_(self) -> str:
        return self.svg()


def curve_svg(
    x: Sequence[float], y: Sequence[float], *, x_label: str, y_label: str, logarithmic: bool, mark: float | None = None
) -> str:
    """The picture.

    Args:
        x: from left to right; more than 0 where `logarithmic`.
        y: as many as `x`.
        x_label: what x is.
        y_label: what y is.
        logarithmic: whether x is drawn by its logarithm.
        mark: an x at which a line is drawn from top to bottom.
    """
    points = [(math.log10(a) if logarithmic else a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    low_x, high_x = _range([a for a, _ in points])
    low_y, high_y = _range([b for _, b in points])

    def across(value: float) -> float:
        return round(_LEFT + (value - low_x) / (high_x - low_x) * (_WIDTH - _LEFT - _RIGHT), 1)

    def up(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - (value - low_y) / (high_y - low_y) * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>']
    for step in range(_TICKS + 1):
        at_x, at_y = low_x + (high_x - low_x) * step / _TICKS, low_y + (high_y - low_y) * step / _TICKS
        parts.append(_line(across(at_x), _TOP, across(at_x), _HEIGHT - _BOTTOM, "#ddd"))
        parts.append(_line(_LEFT, up(at_y), _WIDTH - _RIGHT, up(at_y), "#ddd"))
        parts.append(_text(across(at_x), _HEIGHT - _BOTTOM + 18, f"{10**at_x if logarithmic else at_x:.3g}", "middle"))
        parts.append(_text(_LEFT - 8, up(at_y) + 4, f"{at_y:.3g}", "end"))
    line = " ".join(f"{across(a)},{up(b)}" for a, b in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#3949ab" stroke-width="2"/>')
    if mark is not None:
        at = across(math.log10(mark) if logarithmic else mark)
        parts.append(_line(at, _TOP, at, _HEIGHT - _BOTTOM, "#d81b60"))
        parts.append(_text(at, _TOP - 8, f"{mark:.3g}", "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 14, x_label, "middle"))
    parts.append(_text(8, _TOP - 8, y_label, "start"))
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(parts)}</svg>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Where an axis begins and ends; never the same, so that it can be divided."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


class ExponentialAverage:
    """The average of the numbers that it was called with.

    Args:
        stays: how much of the average stays when a number comes, from 0 to less than 1.
    """

    def __init__(self, stays: float) -> None:
        self._stays = stays
        self._sum = self._weight = 0.0

    def __call__(self, value: float) -> float:
        """Take a number in; the average with it."""
        self._sum = self._stays * self._sum + (1 - self._stays) * value
        self._weight = self._stays * self._weight + (1 - self._stays)
        return self._sum / self._weight


def steepest_fall(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which losses fall fastest by the rate's logarithm, before they are least; None where they never fall.

    Args:
        rates: rising, more than 0.
        losses: one for each rate; those that are not finite are passed over.
    """
    finite = [each if math.isfinite(each) else math.inf for each in losses]
    least = finite.index(min(finite, default=math.inf)) if finite else 0
    slopes = {
        (finite[at + 1] - finite[at]) / math.log(rates[at + 1] / rates[at]): rates[at]
        for at in range(least)
        if math.isfinite(finite[at])
    }
    steepest = min(slopes, default=0.0)
    return slopes[steepest] if steepest < 0 else None
