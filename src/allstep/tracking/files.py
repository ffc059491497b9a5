"""Trackers that write files: CSV and TensorBoard's event files. Both take back what is behind a step.

Contract: see `tracker`. Each writes to the folder that `open` is given, or to one of its own, where nobody else writes.
"""

from __future__ import annotations

import csv
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from allstep.tracking.values import Histogram, Image, Value

_SUFFIX = ".allstep"  # of event files, by which this tracker knows its own
_FRAME = struct.Struct("<QI")  # before an event in its file: the length, and a check of it; behind it 4 bytes more


class CSV:
    """A table with a row a record and a column a name; numbers and texts.

    Args:
        path: of the file; by default metrics.csv in the folder of the Track.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._columns = ["step", "time"]
        self._rows: list[dict[str, str]] = []
        self._time = 0.0

    def open(self, folder: Path) -> None:
        """Go on in the file, if there is one."""
        self.path = folder / "metrics.csv" if self.path is None else self.path
        self._columns = self._read()[0]

    def log_time(self, seconds: float) -> None:
        """When the next record was made."""
        self._time = seconds

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Keep a row until `flush`."""
        cells = {
            name: value.replace("\r", "").replace("\n", "\\n") if isinstance(value, str) else repr(value)
            for name, value in values.items()
            if isinstance(value, int | float | str)
        }
        if cells:
            self._rows.append({"step": str(step), "time": f"{self._time:.3f}", **cells})

    def flush(self) -> None:
        """Write the rows; where there is a new name, the whole table anew."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        names = dict.fromkeys([*self._columns, *(name for row in rows for name in row)])
        if list(names) != self._columns or not self._path.exists():
            before = self._read()[1]
            self._columns = list(names)
            self._replace([*before, *rows])
        else:
            with self._path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerows(rows)

    def withdraw(self, step: int) -> None:
        """Take back the rows at `step` or later."""
        self._rows = []
        self._columns, rows = self._read()
        self._replace([row for row in rows if int(row["step"]) < step])

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the file is the run."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Nothing to go on from but the file."""

    @property
    def _path(self) -> Path:
        assert self.path is not None, "open() comes first"
        return self.path

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Columns and whole rows; the last one may have been cut off by a kill."""
        if not self._path.exists():
            return ["step", "time"], []
        text = self._path.read_text()
        reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        rows = [row for row in reader if None not in row and None not in row.values()]
        return list(reader.fieldnames or ["step", "time"]), rows

    def _replace(self, rows: list[dict[str, str]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".new")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self._path)


class TensorBoard:
    """TensorBoard's event files: numbers, texts, histograms, images and the configuration, as a text.

    Args:
        folder: where TensorBoard looks for the run; by default "tensorboard" in the folder of the Track.
    """

    package = "tensorboard"

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._writer: Any = None
        self._time = 0.0
        self._withdrawn: int | None = None  # the step, for a TensorBoard that is looking on

    def open(self, folder: Path) -> None:
        """Write there where no folder was given."""
        self.folder = folder / "tensorboard" if self.folder is None else self.folder

    def log_time(self, seconds: float) -> None:
        """When the next record was made."""
        self._time = seconds

    def configure(self, config: Mapping[str, Any]) -> None:
        """Show the configuration as a table among the texts."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in config.items())
        self.log({"config": f"| name | value |\n|---|---|\n{rows}"}, 0)

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Give them to the writer."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import (
            EventFileWriter,
        )

        if self._writer is None:
            self._writer = EventFileWriter(str(self.folder), filename_suffix=_SUFFIX)
            if self._withdrawn is not None:
                session = SessionLog(status=SessionLog.START)
                self._writer.add_event(Event(wall_time=self._time, step=self._withdrawn, session_log=session))
                self._withdrawn = None
        summary = Summary(value=[_summary_value(name, value) for name, value in values.items()])
        self._writer.add_event(Event(wall_time=self._time, step=step, summary=summary))

    def flush(self) -> None:
        """Wait until all is in the file."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def withdraw(self, step: int) -> None:
        """Cut the event files where the first event at `step` or later stands."""
        self.close()
        assert self.folder is not None, "open() comes first"
        for path in sorted(self.folder.glob(f"*tfevents*{_SUFFIX}")):
            end, events = _end_before(path, step)
            if events:
                os.truncate(path, end)
            else:
                path.unlink()
        self._withdrawn = step

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the folder is the run."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Nothing to go on from but the folder."""


def _end_before(path: Path, step: int) -> tuple[int, int]:
    """Where the first event at `step` or later begins, or one that a kill cut off; and how many are before it."""
    from tensorboard.compat.proto.event_pb2 import Event

    end = events = 0
    for data, behind in frames(path):
        event = Event.FromString(data)
        if event.HasField("summary"):
            if event.step >= step:
                break
            events += 1
        end = behind
    return end, events


def frames(path: Path) -> Iterator[tuple[bytes, int]]:
    """Each whole event in a file, and where it ends."""
    content = path.read_bytes()
    at = 0
    while at + _FRAME.size <= len(content):
        length, _ = _FRAME.unpack_from(content, at)
        behind = at + _FRAME.size + length + 4
        if behind > len(content):
            return
        yield content[at + _FRAME.size : behind - 4], behind
        at = behind


def _summary_value(name: str, value: Value) -> Any:
    """One value as TensorBoard has it."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
    from torch.utils.tensorboard.summary import text

    if isinstance(value, str):
        return text(name, value).value[0]  # type: ignore[no-untyped-call]
    if isinstance(value, Histogram):
        middles = [(low + high) / 2 for low, high in zip(value.edges, value.edges[1:], strict=False)]
        pairs = list(zip(value.counts, middles, strict=True))
        histogram = HistogramProto(
            min=value.edges[0],
            max=value.edges[-1],
            num=sum(value.counts),
            sum=sum(count * middle for count, middle in pairs),
            sum_squares=sum(count * middle * middle for count, middle in pairs),
            bucket_limit=value.edges[1:],
            bucket=value.counts,
        )
        return Summary.Value(tag=name, histo=histogram)
    if isinstance(value, Image):
        content = Path(value.path).read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        return Summary.Value(
            tag=name, image=Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        )
    return Summary.Value(tag=name, simple_value=value)
