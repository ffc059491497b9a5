"""The pipes of an attempt's workers, read as the run's loop goes round.

Contract: `open` once per worker. What comes is given to the rank's `RankOutput`. `adjust`, called before each wait,
stops reading while the terminal is congested and begins again after. `drain` takes what a pipe holds at this moment, so
that a worker's last words are there when its end is judged. `close` ends what is still open (a descendant of a worker
may hold it) and closes the logs; the descriptors themselves are the workers'.
"""

from __future__ import annotations

import os
from functools import partial

from allstep.launch.loop import Loop
from allstep.launch.rank_output import RankOutput, Stream
from allstep.launch.terminal import Terminal

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
