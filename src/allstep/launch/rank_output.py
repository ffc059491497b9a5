"""Where a rank's output goes: its log, the terminal if shown, and tails kept for the report.

Contract: one `RankOutput` per worker, fed by the supervisor's loop from the worker's two pipes. A log that can no
longer be written (a full disk) is given up with one warning; the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal

from allstep.launch.lines import Lines, Tail, Verbatim, rank_prefix
from allstep.launch.outlet import Outlet

Stream = Literal["stdout", "stderr"]


class RankOutput:
    """Takes what one rank writes and passes it on.

    Args:
        rank: the rank.
        outlets: where its streams are shown; empty for a rank that is not.
        prefixed: put the rank before each line.
        coloured: the streams whose prefix is coloured.
        log: the file that gets all it writes, or None.
        warn: called with a text when the log is given up.
    """

    def __init__(
        self,
        rank: int,
        outlets: dict[Stream, Outlet],
        *,
        prefixed: bool,
        coloured: frozenset[Stream],
        log: Path | None,
        warn: Callable[[str], None],
    ) -> None:
        self._outlets = outlets
        self._cut: dict[Stream, Lines | Verbatim] = {
            stream: Lines(rank_prefix(rank, colour=stream in coloured)) if prefixed else Verbatim()
            for stream in outlets
        }
        self._tails = {"all": Tail(), "stderr": Tail()}
        self._path = log
        self._log: BinaryIO | None = open(log, "ab", buffering=0) if log is not None else None  # noqa: SIM115
        self._warn = warn

    def feed(self, stream: Stream, data: bytes) -> None:
        """Pass on what was read from a stream."""
        self._tails["all"].feed(data)
        if stream == "stderr":
            self._tails["stderr"].feed(data)
        if self._log is not None:
            self._write_log(self._log, data)
        if stream in self._outlets:
            self._outlets[stream].write(self._cut[stream].feed(data))

    def end(self, stream: Stream) -> None:
        """Pass on an unfinished last line: the stream has ended."""
        if stream in self._outlets:
            self._outlets[stream].write(self._cut[stream].rest())

    def last_words(self) -> str:
        """Return the last text of its standard error."""
        return self._tails["stderr"].text()

    def last_output(self) -> str:
        """Return the last text that it wrote, to either stream."""
        return self._tails["all"].text()

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _write_log(self, log: BinaryIO, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[log.write(view) :]
        except OSError as error:
            self.close()
            self._warn(f"{self._path} is no longer written: {error.strerror}")
