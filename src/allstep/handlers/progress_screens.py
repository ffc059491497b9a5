"""Where a progress bar is drawn: a terminal, the launcher's terminal, a notebook, or a log that takes lines.

Contract: `choose_screen` looks at where this process' standard error goes. A `ProgressScreen` shows one line that is
replaced with each `draw`, and keeps lines that are given to `leave`. What the process prints meanwhile stands above it.

Under `allstep run` all ranks share the supervisor's terminal and this process writes to a pipe. The supervisor says in
ALLSTEP_STATUS_LINE how wide its terminal is, and takes the line out of what it reads: it is shown below the lines of
all ranks and is in no log. See `allstep.protocol.status_frames`.

What can go wrong: other processes that write to the same terminal by themselves, as ranks under torchrun do, do not
know of the line, so that theirs may begin behind it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping
from html import escape
from typing import Any, Protocol, TextIO

from allstep.protocol.status_frames import VARIABLE, status_frame
from allstep.world.current import running_shell

_ERASE = "\r\x1b[K"
_BAR = re.compile(r"(.*?): +(\d+)%\|[^|]*\| (.*)")  # as tqdm lays out a line whose end is known


class ProgressScreen(Protocol):
    """Where progress is shown.

    Attributes:
        seconds: between one drawing and the next.
    """

    seconds: float

    @property
    def columns(self) -> int | None:
        """How wide the line may be; None where it is no bar but a line of a log."""

    def draw(self, text: str) -> None:
        """Show this in place of what was drawn before."""

    def leave(self, text: str) -> None:
        """Keep this, in place of what was drawn before."""

    def close(self) -> None:
        """Show nothing any more."""


def choose_screen(environ: Mapping[str, str], *, log_seconds: float) -> ProgressScreen:
    """The screen for this process' standard error, or the notebook that it runs in.

    Args:
        environ: where the supervisor says that it has a terminal.
        log_seconds: between lines where there is no terminal.
    """
    if is_notebook():
        return NotebookScreen()
    width = environ.get(VARIABLE, "")
    if width.isdecimal():
        return LauncherScreen(int(width))
    if sys.stderr.isatty() and environ.get("TERM") != "dumb":
        return TerminalScreen()
    return LogScreen(log_seconds)


def is_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    return hasattr(running_shell(), "kernel")


def _printable(text: str) -> str:
    """One line, and no orders to a terminal."""
    return "".join(each if each.isprintable() else " " for each in text)


class LogScreen:
    """Lines of a log, now and then."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.columns = None

    def draw(self, text: str) -> None:
        """Write a line."""
        print(_printable(text), file=sys.stderr, flush=True)

    leave = draw

    def close(self) -> None:
        """Nothing is left to do."""


class LauncherScreen:
    """The supervisor's terminal, which it draws the line on."""

    seconds = 0.2

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def draw(self, text: str) -> None:
        """Have the supervisor show this below all ranks' lines."""
        sys.stderr.write(status_frame(_printable(text)))
        sys.stderr.flush()

    def leave(self, text: str) -> None:
        """Write a line like any other."""
        self.draw("")
        print(_printable(text), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Have the supervisor show none."""
        self.draw("")


class TerminalScreen:
    """This process' own terminal: the last line is drawn again below what is printed."""

    seconds = 0.1

    def __init__(self) -> None:
        self._terminal = sys.stderr
        self._text = ""
        self._streams: dict[str, TextIO] = {}
        self._logging: list[tuple[logging.StreamHandler[Any], TextIO]] = []

    @property
    def columns(self) -> int:
        """Of the terminal as it is now. The last one stays free: some terminals go on to the next line with it."""
        return shutil.get_terminal_size().columns - 1

    def draw(self, text: str) -> None:
        """Draw the line, from now on below what is printed."""
        if not self._streams:
            self._stand_between()
        self._text = _printable(text)
        self._terminal.write(_ERASE + self._text)
        self._terminal.flush()

    def leave(self, text: str) -> None:
        """Turn the line into one of those above."""
        self.above(self._terminal, _printable(text) + "\n", is_last=True)

    def close(self) -> None:
        """Erase the line, and let prints go straight to the terminal again."""
        if self._streams:
            self.above(self._terminal, "", is_last=True)
        for name, stream in self._streams.items():
            if isinstance(getattr(sys, name), _StreamAbove):  # else somebody has put another one there since
                setattr(sys, name, stream)
        for handler, logged in self._logging:
            handler.setStream(logged)
        self._streams.clear()
        self._logging.clear()

    def above(self, stream: TextIO, text: str, *, is_last: bool = False) -> int:
        """Write to a stream that shows on the terminal, and draw the line again below a whole line."""
        self._terminal.write(_ERASE if self._text or is_last else "")
        self._terminal.flush()
        written = stream.write(text)
        if is_last:
            self._text = ""
        elif text.endswith("\n"):
            stream.flush()
            self._terminal.write(self._text)
            self._terminal.flush()
        return written

    def _stand_between(self) -> None:
        self._terminal = sys.stderr
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty():
                self._streams[name] = stream
                setattr(sys, name, _StreamAbove(stream, self))
        # Handlers of logging keep the stream that they were made with.
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in self._streams.values():
                self._logging.append((handler, handler.stream))
                handler.setStream(_StreamAbove(handler.stream, self))


class _StreamAbove:
    """A stream whose text goes above the line that a screen has drawn."""

    def __init__(self, stream: TextIO, screen: TerminalScreen) -> None:
        self._stream = stream
        self._screen = screen

    def write(self, text: str) -> int:
        return self._screen.above(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class NotebookScreen:
    """A place in the cell's output, which keeps what was drawn last: the browser's own bar, or text without one."""

    seconds = 0.2
    columns = 100

    def __init__(self) -> None:
        self._handle: Any = None

    def draw(self, text: str) -> None:
        """Show the line, in its place."""
        shown = {"text/plain": _printable(text), "text/html": _as_html(_printable(text))}
        if self._handle is None:
            self._handle = sys.modules["IPython"].display.display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)

    def leave(self, text: str) -> None:
        """Keep this in the place, and take another one for what comes next."""
        self.draw(text)
        self._handle = None

    def close(self) -> None:
        """What was drawn last stays, and is replaced by what the next run draws."""


def _as_html(text: str) -> str:
    """The line with the browser's bar in place of the blocks."""
    bar = _BAR.fullmatch(text)
    if bar is None:
        return f"<pre>{escape(text)}</pre>"
    before, percent, behind = bar.groups()
    shown = f'{escape(before)}: <progress value="{percent}" max="100"></progress> {percent}% {escape(behind)}'
    return f'<div style="font-family: monospace; white-space: pre">{shown}</div>'


def can_draw_blocks() -> bool:
    """Whether the encoding of standard error has the characters that a bar is drawn of."""
    encoding = "utf-8" if is_notebook() else getattr(sys.stderr, "encoding", None) or os.device_encoding(2) or ""
    return encoding.lower().replace("-", "") in ("utf8", "utf16", "utf32")
