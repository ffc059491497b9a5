"""What the workers write: read from pipes, kept in logs, and shown on the terminal with the rank before each line.

Contract: the bytes of a worker take this way, and each class is one stage of it:
1. `RankStreams` reads the pipes of all workers as the event loop finds them readable.
2. `RankOutput`, one for each worker, keeps the last text for the report and writes the log.
3. `PrefixedLines` cuts what is to be shown into whole lines, so that lines of different ranks never mix.
4. `Terminal` has the supervisor's own standard output and error. `say` is what allstep itself has to tell.
5. `NonBlockingOutput` writes to one of these without ever making the loop wait.
No encoding is assumed anywhere.

What can go wrong, and what is done about it; the run goes on in each case:
- The reader of the terminal (a pager, a slow connection) takes nothing. Its bytes are kept, and while they are many the
  workers' pipes are not read: the output pauses, and not the watch over the workers.
- The reader goes away. It is said once, and what would be shown is dropped; logs still get everything.
- A log can no longer be written, because a disk is full, say. It is given up with one warning.
- A descendant of a worker holds its pipe open after the worker's end. The attempt decides how long that is waited for.
"""

from __future__ import annotations

import os
import re
import select
import selectors
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

from allstep.launch.event_loop import EventLoop
from allstep.launch.status_line import StatusLine
from allstep.protocol.foreign_text import printable
from allstep.protocol.masking import mask
from allstep.protocol.private_files import open_private
from allstep.protocol.status_frames import StatusFrames

Stream = Literal["stdout", "stderr"]

LONGEST_LINE = 1 << 20
"""Bytes of an unfinished line that are kept waiting for its end; a longer line comes in pieces."""

_CONGESTED = 1 << 20  # bytes that wait for the terminal's reader, from which on the workers are not read
_READ_SIZE = 1 << 16
_READS_AT_END = 16  # more than a pipe holds, so that only a writer that still lives could exceed it
_TAIL_SIZE = 1 << 16
_COLOURS = (36, 33, 32, 35, 34, 31)  # of a terminal's foreground; chosen to differ from their neighbours

# A carriage return ends a line too, so that progress bars work. At the very end it may be half of "\r\n", so it waits
# for what follows.
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")


class RankStreams:
    """Standard output and error of this machine's workers in one attempt.

    `open` is called once for each worker; the descriptors stay the caller's.
    """

    def __init__(self, loop: EventLoop, terminal: Terminal) -> None:
        self._loop = loop
        self._terminal = terminal
        self._outputs: dict[int, RankOutput] = {}
        self._open: dict[int, tuple[int, Stream]] = {}  # by descriptor
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
        """Stop reading the workers while the terminal is congested; called before each wait."""
        reading = not self._terminal.congested
        if reading != self._reading:
            self._reading = reading
            for fd in self._open:
                if reading:
                    self._loop.watch(fd, partial(self._read, fd))
                else:
                    self._loop.forget(fd)

    def drain(self, rank: int) -> None:
        """Take what a rank's pipes hold now, so that its last words are there when its end is judged."""
        for fd, (owner, _) in list(self._open.items()):
            if owner == rank:
                reads = _READS_AT_END
                while reads and self._read(fd):
                    reads -= 1

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
            if fd in self._open:  # a descendant of the worker still holds the other end
                self._end(fd, rank, stream)
        for output in self._outputs.values():
            output.close()

    def _read(self, fd: int) -> bool:
        """Pass on what a pipe has; return whether there may be more."""
        rank, stream = self._open[fd]
        try:
            data = os.read(fd, _READ_SIZE)
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


class RankOutput:
    """Takes what one rank writes and passes it on.

    Args:
        rank: the rank.
        shown_on: where each of its streams is shown; empty for a rank that is not.
        prefixed: put the rank before each line. Without, everything passes at once and unchanged, so that the prompt
            of a debugger in a single worker is seen.
        coloured: the streams whose prefix is coloured.
        log: the file that gets all it writes, or None.
        warn: called with a text when the log is given up.

    Raises:
        OSError: the log cannot be opened.
    """

    def __init__(
        self,
        rank: int,
        shown_on: dict[Stream, NonBlockingOutput],
        *,
        prefixed: bool,
        coloured: frozenset[Stream],
        log: Path | None,
        warn: Callable[[str], None],
    ) -> None:
        self._shown_on = shown_on
        self._lines = {
            stream: PrefixedLines(rank_prefix(rank, colour=stream in coloured)) for stream in shown_on if prefixed
        }
        self._frames = StatusFrames()
        self._shows_status = False
        self._last = {"stdout": bytearray(), "stderr": bytearray(), "all": bytearray()}
        self._path = log
        # Unbuffered: what a worker wrote is in the log also where the supervisor is killed.
        self._log: BinaryIO | None = None
        if log is not None:
            self._log = open(log, "ab", buffering=0, opener=open_private)  # noqa: SIM115
        self._warn = warn

    def feed(self, stream: Stream, data: bytes) -> None:
        """Pass on what was read from a stream."""
        if stream == "stderr":
            data, status = self._frames.feed(data)
            if status is not None:
                self._show_status(status)
        self._pass_on(stream, data)

    def _pass_on(self, stream: Stream, data: bytes) -> None:
        for name in (stream, "all"):
            self._last[name] += data
            del self._last[name][:-_TAIL_SIZE]
        if self._log is not None:
            self._write_log(self._log, data)
        if stream in self._shown_on:
            lines = self._lines.get(stream)
            self._shown_on[stream].write(lines.feed(data) if lines is not None else data)

    def end(self, stream: Stream) -> None:
        """Pass on an unfinished last line: the stream has ended."""
        if stream == "stderr":
            self._pass_on(stream, self._frames.rest())
            if self._shows_status:
                self._show_status(b"")
        if stream in self._lines:
            self._shown_on[stream].write(self._lines[stream].rest())

    def last_words(self) -> str:
        """Return the last text of its standard error, with a replacement character for what is not UTF-8."""
        return self._last["stderr"].decode("utf-8", "replace")

    def last_output(self) -> str:
        """Return the last text that it wrote, to either stream."""
        return self._last["all"].decode("utf-8", "replace")

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _show_status(self, text: bytes) -> None:
        output = self._shown_on.get("stderr")
        if isinstance(output, TerminalOutput):
            output.show_status(text)
            self._shows_status = bool(text)

    def _write_log(self, log: BinaryIO, data: bytes) -> None:
        unwritten = memoryview(data)
        try:
            while unwritten:
                unwritten = unwritten[log.write(unwritten) :]
        except OSError as error:
            self.close()
            self._warn(f"{self._path} is no longer written: {error.strerror}")


class PrefixedLines:
    """Cuts a stream of bytes into whole lines, each given back with `prefix` before it."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._unfinished = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Take `data` and return the lines that are now whole."""
        text = self._unfinished
        searched = max(0, len(text) - 1)  # but for a carriage return that waits, what is kept has no line end
        text += data
        lines = []
        begin = 0
        for end in _LINE_END.finditer(text, searched):
            line = text[begin : end.end()]
            # A progress bar begins with a carriage return; a prefix for that alone would be overwritten at once.
            lines.append(line if line == b"\r" else self._prefix + line)
            begin = end.end()
        del text[:begin]
        if len(text) > LONGEST_LINE:
            lines.append(self._prefix + text + b"\n")
            text.clear()
        return b"".join(lines)

    def rest(self) -> bytes:
        """Return the unfinished last line, ended, or nothing."""
        unfinished = bytes(self._unfinished)
        self._unfinished.clear()
        return self._prefix + unfinished + b"\n" if unfinished.strip(b"\r") else b""


def rank_prefix(rank: int, *, colour: bool) -> bytes:
    """Return what stands before each line of a rank, in the rank's colour if asked for."""
    if not colour:
        return b"[%d] " % rank
    return b"\x1b[%dm[%d]\x1b[0m " % (_COLOURS[rank % len(_COLOURS)], rank)


class Terminal:
    """The supervisor's standard output and error, for as long as the run.

    Args:
        loop: the run's event loop.
        environ: the supervisor's environment (NO_COLOR is looked at).
        secrets: what is never shown in what allstep itself says.
    """

    def __init__(self, loop: EventLoop, environ: Mapping[str, str], secrets: Collection[str] = ()) -> None:
        self.outputs: dict[Stream, NonBlockingOutput] = {"stdout": NonBlockingOutput(1), "stderr": NonBlockingOutput(2)}
        on_terminal: frozenset[Stream] = frozenset(
            stream for stream, output in self.outputs.items() if os.isatty(output.fd)
        )
        self.coloured = frozenset() if environ.get("NO_COLOR") else on_terminal
        self._status: StatusLine | None = None
        if "stderr" in on_terminal and environ.get("TERM") != "dumb":
            # One for both, since both are most often the same terminal.
            self._status = status = StatusLine(self.outputs["stderr"].fd)
            self.outputs.update((stream, TerminalOutput(self.outputs[stream].fd, status)) for stream in on_terminal)
        self.kept_in = ""
        self._secrets = secrets
        self._loop = loop
        self._told_closed = False

    @property
    def status_columns(self) -> int | None:
        """How wide a rank's status line may be; None where standard error is no terminal."""
        return None if self._status is None else self._status.columns

    @property
    def congested(self) -> bool:
        """Whether a reader is so slow that nothing more should be read for it."""
        return any(output.backlog >= _CONGESTED for output in self.outputs.values())

    @property
    def waiting(self) -> bool:
        """Whether something is not written yet."""
        return any(output.backlog for output in self.outputs.values())

    def say(self, text: str) -> None:
        """Write what allstep itself has to say; whoever's words it repeats, they are no orders to a terminal."""
        shown = printable(mask(text, self._secrets), lines=True)
        self.outputs["stderr"].write(f"allstep: {shown}\n".encode(errors="replace"))

    def adjust(self) -> None:
        """Have the loop tell when a slow reader can take more; called before each wait.

        Says once that the reader of standard output is gone.
        """
        for output in self.outputs.values():
            if output.backlog and not self._loop.watches(output.fd):
                self._loop.watch(output.fd, self._flush, selectors.EVENT_WRITE)
            elif not output.backlog:
                self._loop.forget(output.fd)
        if not self._told_closed and self.outputs["stdout"].closed:
            self._told_closed = True
            kept = f"; what the ranks write is in {self.kept_in}" if self.kept_in else ""
            self.say(f"nobody reads standard output any more, the run goes on{kept}")

    def _flush(self) -> None:
        for output in self.outputs.values():
            output.flush()


class NonBlockingOutput:
    """Buffered writing to a file descriptor that may be slow or go away.

    The descriptor itself stays blocking, since it is shared with whoever started this process: a shell, say. So a write
    is made only when the descriptor is ready, and is no larger than what a ready pipe takes without waiting.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.closed = False
        self._unwritten = bytearray()
        self._ready = select.poll()
        self._ready.register(fd, select.POLLOUT)

    @property
    def backlog(self) -> int:
        """Bytes that wait for the reader."""
        return len(self._unwritten)

    def write(self, data: bytes) -> None:
        """Write what the reader takes now and keep the rest; drop everything when the reader is gone."""
        if not self.closed:
            self._unwritten += data
            self.flush()

    def flush(self) -> None:
        """Write what the reader takes now."""
        written = 0
        piece = max(512, getattr(select, "PIPE_BUF", 512))  # POSIX has at least 512 everywhere
        try:
            while written < len(self._unwritten) and self._ready.poll(0):
                written += os.write(self.fd, self._unwritten[written : written + piece])
        except BlockingIOError:  # somebody who shares the descriptor made it non-blocking
            pass
        except OSError:
            self.closed = True
            written = len(self._unwritten)
        del self._unwritten[:written]


class TerminalOutput(NonBlockingOutput):
    """Output to a terminal with a status line below all that is shown."""

    def __init__(self, fd: int, status: StatusLine) -> None:
        super().__init__(fd)
        self._status = status

    def write(self, data: bytes) -> None:
        """Write above the status line."""
        super().write(self._status.around(data))

    def show_status(self, text: bytes) -> None:
        """Have the status line say this; nothing takes it away."""
        super().write(self._status.show(text))
