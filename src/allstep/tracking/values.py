"""What a run tells of itself at one step: numbers, texts, histograms and images, and how they stand in a line of JSON.

Contract: pure functions. `to_line` and `from_line` are each other's inverse for what `settled` gives. `settled` is
called by the thread that writes, so that a tensor on a device is waited for there and not in the training loop. Numbers
that are no finite ones are the texts "NaN", "Infinity" and "-Infinity" in JSON, which has none of its own; a text of a
user's is an object, {"text": ...}, and is not taken for one.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from allstep.errors import ArgumentError, ArgumentTypeError

RESERVED = ("step", "epoch", "time", "config")
"""Keys of a line that are no values' names."""

_NO_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_PNG_COLOURS = {1: 0, 3: 2, 4: 6}  # channels to PNG's colour type: grey, RGB, RGB with alpha


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many numbers lie between edges: `counts` of n bins, `edges` n + 1 rising numbers."""

    counts: tuple[float, ...]
    edges: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Image:
    """A picture in a PNG file; `path` is absolute for trackers, and relative to the folder in a line."""

    path: str


Value: TypeAlias = float | int | str | Histogram | Image


@dataclass(frozen=True, slots=True)
class Record:
    """What is told at one step.

    Attributes:
        step: iterations that the trainer has done.
        epoch: its present epoch.
        time: seconds since 1970, by the main rank's clock.
        values: by name.
        config: the run's configuration, in the first record of one that has any.
    """

    step: int
    epoch: int
    time: float
    values: Mapping[str, Any]
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Counted:
    """A histogram whose numbers may still be on their way from a device."""

    counts: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def settle(self) -> Histogram:
        """Wait for the numbers."""
        low, high = float(self.low), float(self.high)
        edges = np.linspace(low, high if high > low else low + 1.0, len(self.counts) + 1)
        return Histogram(tuple(self.counts.tolist()), tuple(edges.tolist()))


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that is not written yet: height, width and 1, 3 or 4 channels, uint8 or 0 to 1."""

    pixels: Any


def count_values(numbers: Any, bins: int = 64) -> Counted:
    """A histogram of any tensor or array, without waiting for its device.

    Raises:
        ArgumentError: there are no numbers in it.
    """
    tensor = torch.as_tensor(numbers).detach().float().flatten()
    if tensor.numel() == 0:
        raise ArgumentError("a histogram needs at least one number; leave an empty tensor out")
    tensor = torch.nan_to_num(tensor)
    low, high = tensor.min(), tensor.max()
    # By hand, since torch.histc would wait for the device to tell it the range.
    width = torch.where(high > low, high - low, torch.ones_like(high))
    places = ((tensor - low) / width * bins).long().clamp_(0, bins - 1)
    counts = torch.zeros(bins, dtype=torch.int64, device=tensor.device).scatter_add_(0, places, torch.ones_like(places))
    return Counted(counts, low, high)


def check_value(name: str, value: Any) -> Any:
    """What is kept of a value until it is written; a tensor is copied, since a step may change it.

    Raises:
        ArgumentError: the name is reserved, or the value is several numbers.
        ArgumentTypeError: it is no value.
    """
    if not isinstance(name, str) or name in RESERVED or not name:
        raise ArgumentError(f"the name of a value is {name!r}; give a text other than {', '.join(RESERVED)}")
    if isinstance(value, str | Histogram | Counted | Picture | Image):
        return value
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        size = value.numel() if isinstance(value, torch.Tensor) else value.size
        if size != 1:
            raise ArgumentError(f"{name!r} has {size} numbers; give one, or track.histogram({name!r}, value)")
        return value.detach().clone() if isinstance(value, torch.Tensor) else value.item()
    if isinstance(value, int | float):
        return value
    raise ArgumentTypeError(f"{name!r} is a {type(value).__name__}; give a number, a text, or a tensor of one number")


def settled(value: Any, write_png: Callable[[bytes], str]) -> Value:
    """A value as it stands in a line; `write_png` keeps the bytes of a picture and says where."""
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, Counted):
        return value.settle()
    if isinstance(value, Picture):
        return Image(write_png(png(value.pixels)))
    return value  # type: ignore[no-any-return]


def to_line(record: Record) -> str:
    """One line of JSON, without its end."""
    line: dict[str, Any] = {"step": record.step, "epoch": record.epoch, "time": round(record.time, 3)}
    if record.config is not None:
        line["config"] = record.config
    line.update((name, _to_json(value)) for name, value in record.values.items())
    return json.dumps(line, ensure_ascii=False, default=str)


def from_line(line: str) -> Record:
    """The record of a line. Raises ValueError where it is none."""
    found = json.loads(line)
    values = {name: _from_json(value) for name, value in found.items() if name not in RESERVED}
    return Record(found["step"], found["epoch"], found["time"], values, found.get("config"))


def _to_json(value: Value) -> Any:
    if isinstance(value, Histogram):
        return {"histogram": {"counts": list(value.counts), "edges": list(value.edges)}}
    if isinstance(value, Image):
        return {"image": value.path}
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _from_json(value: Any) -> Value:
    if isinstance(value, str):
        return _NO_NUMBERS[value]
    if isinstance(value, Mapping):
        if "histogram" in value:
            content = value["histogram"]
            return Histogram(tuple(content["counts"]), tuple(content["edges"]))
        return Image(value["image"]) if "image" in value else str(value["text"])
    return value  # type: ignore[no-any-return]


def png(pixels: Any) -> bytes:
    """A PNG file (ISO/IEC 15948) of an image: height, width and, if any, 1, 3 or 4 channels; uint8, or 0 to 1.

    Raises:
        ArgumentError: it has another shape.
    """
    array = np.asarray(pixels.detach().cpu() if isinstance(pixels, torch.Tensor) else pixels)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in _PNG_COLOURS:
        raise ArgumentError(
            f"an image has the shape {array.shape}; give (height, width, channels) with 1, 3 or 4 channels"
        )
    if array.dtype != np.uint8:
        array = (np.nan_to_num(array.astype(np.float64)).clip(0, 1) * 255).round().astype(np.uint8)
    height, width, channels = array.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), array.reshape(height, -1)], axis=1)  # 0: a row as it is
    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLOURS[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
