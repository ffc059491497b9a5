"""The bytes that ranks write: cut into lines, prefixed, kept. No encoding is assumed anywhere.

Contract: the supervisor feeds what it reads from a worker's pipe and passes on what comes back. Only whole lines come
back, so lines of different ranks never mix; a carriage return ends a line too, so progress bars work; a line longer
than `LONGEST` comes in pieces. `rest` gives an unfinished last line when the pipe has closed.

Standard output or error of the supervisor, written without ever making it wait.

Contract: `write` keeps what the reader (a pager, a slow terminal) has no room for; the supervisor's loop calls `flush`
when the descriptor is writable again, and stops reading its workers while `backlog` is large, so that a paused pager
pauses the output and not the watch over the workers. When the reader is gone, `closed` becomes true and what is written
afterwards is dropped: the run goes on.

Where a rank's output goes: its log, the terminal if shown, and tails kept for the report.

Contract: one `RankOutput` per worker, fed by the supervisor's loop from the worker's two pipes. A log that can no
longer be written (a full disk) is given up with one warning; the run goes on.

The supervisor's own standard output and error: what it says, and what it passes on of the ranks.

Contract: lives as long as the run. Nothing written here ever makes the loop wait: what a slow reader has no room for
is kept, `adjust` (called before each wait) asks the loop to tell when there is room again, and `congested` says that
so much waits that the ranks' pipes should not be read meanwhile. A reader that goes away is said once; the run goes on.

The pipes of an attempt's workers, read as the run's loop goes round.

Contract: `open` once per worker. What comes is given to the rank's `RankOutput`. `adjust`, called before each wait,
stops reading while the terminal is congested and begins again after. `drain` takes what a pipe holds at this moment, so
that a worker's last words are there when its end is judged. `close` ends what is still open (a descendant of a worker
may hold it) and closes the logs; the descriptors themselves are the workers'.
"""

from __future__ import annotations

import os
import re
import select
import selectors
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

from allstep.launch.event_loop import Loop

LONGEST = 1 << 20
"""Bytes of an unfinished line that are kept waiting for its end."""

# A carriage return at the very end may be half of "\r\n", so it waits for what follows.
_END = re.compile(rb"\r\n|\n|\r(?!\Z)")

_COLOURS = (36, 33, 32, 35, 34, 31)


class Lines:
    """Cuts a stream of bytes into lines, each given back with `prefix` before it."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._unfinished = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Take `data` and return the lines that are now whole."""
        text = self._unfinished
        searched = max(0, len(text) - 1)  # but for a carriage return that waits, what is kept has no line end
        text += data
        done = []
        begin = 0
        for end in _END.finditer(text, searched):
            line = text[begin : end.end()]
            done.append(line if line == b"\r" else self._prefix + line)
            begin = end.end()
        del text[:begin]
        if len(text) > LONGEST:
            done.append(self._prefix + text + b"\n")
            text.clear()
        return b"".join(done)

    def rest(self) -> bytes:
        """Return the unfinished last line, ended, or nothing."""
        unfinished = bytes(self._unfinished)
        self._unfinished.clear()
        return self._prefix + unfinished + b"\n" if unfinished.strip(b"\r") else b""


class Verbatim:
    """Passes everything on at once and unchanged: for a worker without peers."""

    def feed(self, data: bytes) -> bytes:
        """Return `data`."""
        return data

    def rest(self) -> bytes:
        """Return nothing: nothing is held back."""
        return b""


class Tail:
    """Keeps the last `limit` bytes of a stream."""

    def __init__(self, limit: int = 1 << 16) -> None:
        self._limit = limit
        self._kept = bytearray()

    def feed(self, data: bytes) -> None:
        """Take `data`, forgetting what is now too old."""
        self._kept += data
        del self._kept[: -self._limit]

    def text(self) -> str:
        """Return what is kept, with a replacement character for what is not UTF-8."""
        return self._kept.decode("utf-8", "replace")


def rank_prefix(rank: int, *, colour: bool) -> bytes:
    """Return what stands before each line of a rank, in the rank's colour if asked for."""
    if not colour:
        return b"[%d] " % rank
    return b"\x1b[%dm[%d]\x1b[0m " % (_COLOURS[rank % len(_COLOURS)], rank)


_PIECE = 512  # what a writable pipe takes without waiting, on every system (POSIX, PIPE_BUF)


class NonBlockingOutput:
    """Buffered writing to a file descriptor that may be slow or go away."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.closed = False
        self._waiting = bytearray()

    @property
    def backlog(self) -> int:
        """Bytes that wait for the reader."""
        return len(self._waiting)

    def write(self, data: bytes) -> None:
        """Write what there is room for and keep the rest."""
        if not self.closed:
            self._waiting += data
            self.flush()

    def flush(self) -> None:
        """Write what there is room for now."""
        written = 0
        piece = max(_PIECE, getattr(select, "PIPE_BUF", _PIECE))
        try:
            while written < len(self._waiting) and select.select([], [self.fd], [], 0)[1]:
                written += os.write(self.fd, self._waiting[written : written + piece])
        except BlockingIOError:  # somebody who shares the descriptor made it non-blocking
            pass
        except OSError:
            self.closed = True
            written = len(self._waiting)
        del self._waiting[:written]


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
        outlets: dict[Stream, NonBlockingOutput],
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


_BACKLOG = 1 << 20


class Terminal:
    """Both outlets of a run.

    Args:
        loop: the run's loop.
        environ: the supervisor's environment (NO_COLOR is looked at).
    """

    def __init__(self, loop: Loop, environ: Mapping[str, str]) -> None:
        self.outlets: dict[Stream, NonBlockingOutput] = {"stdout": NonBlockingOutput(1), "stderr": NonBlockingOutput(2)}
        self.coloured = _coloured(self.outlets, environ)
        self.kept_in = ""
        self._loop = loop
        self._told_closed = False

    @property
    def congested(self) -> bool:
        """Whether a reader is so slow that nothing more should be read for it."""
        return any(outlet.backlog >= _BACKLOG for outlet in self.outlets.values())

    @property
    def waiting(self) -> bool:
        """Whether something is not written yet."""
        return any(outlet.backlog for outlet in self.outlets.values())

    def say(self, text: str) -> None:
        """Write what allstep itself has to say."""
        self.outlets["stderr"].write(f"allstep: {text}\n".encode(errors="replace"))

    def adjust(self) -> None:
        """Wait for room where a reader is slow, and say so where the reader of standard output is gone."""
        for outlet in self.outlets.values():
            if outlet.backlog and not self._loop.watches(outlet.fd):
                self._loop.watch(outlet.fd, self._flush, selectors.EVENT_WRITE)
            elif not outlet.backlog:
                self._loop.forget(outlet.fd)
        if not self._told_closed and self.outlets["stdout"].closed:
            self._told_closed = True
            kept = f"; what the ranks write is in {self.kept_in}" if self.kept_in else ""
            self.say(f"nobody reads standard output any more, the run goes on{kept}")

    def _flush(self) -> None:
        for outlet in self.outlets.values():
            outlet.flush()


def _coloured(outlets: Mapping[Stream, NonBlockingOutput], environ: Mapping[str, str]) -> frozenset[Stream]:
    if environ.get("NO_COLOR"):
        return frozenset()
    return frozenset(stream for stream, outlet in outlets.items() if os.isatty(outlet.fd))


_CHUNK = 1 << 16
_PIPE = 16  # chunks; more than a pipe holds, so only a living writer could exceed it


class RankStreams:
    """Standard output and error of the workers on this node."""

    def __init__(self, loop: Loop, terminal: Terminal) -> None:
        self._loop = loop
        self._terminal = terminal
        self._outputs: dict[int, RankOutput] = {}
        self._open: dict[int, tuple[int, Stream]] = {}
        self._reading = True

    def open(self, rank: int, pipes: dict[Stream, int], output: RankOutput) -> None:
        """Read the pipes of a worker into `output`."""
        self._outputs[rank] = output
        for stream, fd in pipes.items():
            os.set_blocking(fd, False)
            self._open[fd] = (rank, stream)
            if self._reading:
                self._loop.watch(fd, partial(self._read, fd))

    @property
    def ended(self) -> bool:
        """Whether every pipe has ended."""
        return not self._open

    def adjust(self) -> None:
        """Read the workers, or not, by whether the terminal has room."""
        reading = not self._terminal.congested
        if reading != self._reading:
            self._reading = reading
            for fd in self._open:
                if reading:
                    self._loop.watch(fd, partial(self._read, fd))
                else:
                    self._loop.forget(fd)

    def drain(self, rank: int) -> None:
        """Take what a rank's pipes hold now."""
        for fd, (owner, _) in list(self._open.items()):
            if owner == rank:
                room = _PIPE
                while room and self._read(fd):
                    room -= 1

    def last_words(self, rank: int) -> str:
        """Return the last text of a rank's standard error."""
        return self._outputs[rank].last_words() if rank in self._outputs else ""

    def last_output(self, rank: int) -> str:
        """Return the last text of all that a rank wrote."""
        return self._outputs[rank].last_output() if rank in self._outputs else ""

    def close(self) -> None:
        """Take what is left in the pipes, end unfinished lines, and close the logs."""
        for fd, (rank, stream) in list(self._open.items()):
            self.drain(rank)
            if fd in self._open:
                self._end(fd, rank, stream)
        for output in self._outputs.values():
            output.close()

    def _read(self, fd: int) -> bool:
        """Pass on what a pipe has; return whether there may be more."""
        rank, stream = self._open[fd]
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        if data:
            self._outputs[rank].feed(stream, data)
            return True
        self._end(fd, rank, stream)
        return False

    def _end(self, fd: int, rank: int, stream: Stream) -> None:
        del self._open[fd]
        self._loop.forget(fd)
        self._outputs[rank].end(stream)
