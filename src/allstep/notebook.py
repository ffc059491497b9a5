"""`run`: call a function of a notebook on several ranks from a cell, and see what they print as they print it.

Contract: a cell calls `run(main, nproc=2)`. Each rank is a new process with an open World, forked from a warm server
that has imported torch (see `allstep.testing.run_ranks`), so a second call of the cell starts in a moment. `main` and
what it uses may be defined in cells: they are pickled by value, with cloudpickle. What ranks write to standard output
and error appears below the cell with the rank before each line; a progress bar of the main rank keeps a place of its
own there. None of them is left when the call returns.

What can go wrong: a rank raises, dies or is not done in time; then RanksError tells the first cause, as `allstep run`
does. Interrupting the kernel ends the ranks. CUDA may be in use in the notebook, since ranks are new processes; what is
on a device there is not shared with them.
"""

from __future__ import annotations

import os
import selectors
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from allstep.errors import ArgumentError
from allstep.handlers.progress_screens import NotebookScreen, is_notebook
from allstep.protocol.status_frames import VARIABLE, StatusFrames
from allstep.suggestions import suggests_keywords
from allstep.testing import run_ranks
from allstep.world import World

__all__ = ["run"]

T = TypeVar("T")

_LONGEST_S = 30 * 86400.0
_BLOCK = 1 << 16  # bytes
_COLUMNS = "100"  # of a progress bar


@suggests_keywords
def run(main: Callable[..., T], *args: Any, nproc: int = 2, timeout: float | None = None) -> list[T]:
    """Call `main(world, *args)` on several ranks of this machine.

    Args:
        main: a function, defined in a cell or imported. A rank's device is chosen as by `allstep.init`.
        args: its further arguments.
        nproc: number of ranks, 1 or more.
        timeout: seconds for the whole call; None waits as long as it takes.

    Returns:
        What each rank returned, in rank order.

    Raises:
        ArgumentError: nproc is less than 1, or cloudpickle is not installed.
        RanksError: a rank raised, died or did not finish in time; its message is the report on the first cause.
    """
    try:
        import cloudpickle  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ArgumentError(
            "allstep.notebook.run needs cloudpickle for functions of cells: pip install 'allstep[notebook]'"
        ) from error
    # Packed, so that nobody takes names in it for those of a script that has to be imported.
    call = zlib.compress(cloudpickle.dumps((main, args)))
    with tempfile.TemporaryDirectory() as folder, _printed(Path(folder), nproc):
        limit, shown = _LONGEST_S if timeout is None else timeout, {VARIABLE: _COLUMNS} if is_notebook() else {}
        results = run_ranks(_call, nproc, folder, call, timeout=limit, env=shown)
    return [cloudpickle.loads(zlib.decompress(each)) for each in results]


def _call(world: World, folder: str, call: bytes) -> bytes:
    """What each rank does: it prints into its pipe, and returns its result packed."""
    import cloudpickle

    pipe = os.open(_pipe(Path(folder), world.rank), os.O_WRONLY)
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(pipe, descriptor)
    os.close(pipe)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main, args = cloudpickle.loads(zlib.decompress(call))
    try:
        return zlib.compress(cloudpickle.dumps(main(world, *args)))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _pipe(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}"


@contextmanager
def _printed(folder: Path, nproc: int) -> Iterator[None]:
    """Print what ranks write into their pipes, until the body ends and all of it has been read."""
    selector = selectors.DefaultSelector()
    stop, stopped = os.pipe()
    selector.register(stop, selectors.EVENT_READ, None)
    for rank in range(nproc):
        os.mkfifo(_pipe(folder, rank))
        # For writing too, so that the pipe does not end when the rank does, or before it begins.
        selector.register(os.open(_pipe(folder, rank), os.O_RDWR | os.O_NONBLOCK), selectors.EVENT_READ, _Lines(rank))
    # The cell's own: what a thread prints by itself would come below whichever cell runs next.
    out, screen = sys.stdout, NotebookScreen() if is_notebook() else None
    reader = threading.Thread(target=_read, args=(selector, out, screen), daemon=True, name="allstep notebook output")
    reader.start()
    try:
        yield
    finally:
        os.write(stopped, b".")
        reader.join()
        for key in list(selector.get_map().values()):
            os.close(key.fd)
        os.close(stopped)
        selector.close()


class _Lines:
    """A rank's text, cut into lines; each gets the rank before it.

    Attributes:
        progress: what the rank's progress bar says since it was asked last; None where nothing new.
    """

    def __init__(self, rank: int) -> None:
        self._mark = f"[{rank}] "
        self._rest = b""
        self._frames = StatusFrames()
        self.progress: str | None = None

    def take(self, data: bytes) -> str:
        """The whole lines that there are now. Carriage returns end lines, and stay what they are."""
        data, status = self._frames.feed(data)
        if status is not None:
            self.progress = status.decode(errors="replace")
        *whole, self._rest = (self._rest + data).replace(b"\r\n", b"\n").splitlines(keepends=True) or [b""]
        if self._rest.endswith((b"\n", b"\r")):
            whole, self._rest = [*whole, self._rest], b""
        return "".join(self._mark + each.decode(errors="replace") for each in whole)

    def end(self) -> str:
        """What is left without an end of its line."""
        rest, self._rest = self._rest, b""
        return f"{self._mark}{rest.decode(errors='replace')}\n" if rest else ""


def _read(selector: selectors.BaseSelector, out: Any, screen: NotebookScreen | None) -> None:
    is_over = False
    while True:
        ready = selector.select(0 if is_over else None)
        texts = [(key.data, os.read(key.fd, _BLOCK)) for key, _ in ready if key.data is not None]
        for lines, data in texts:
            out.write(lines.take(data))
            if screen is not None and lines.progress:  # an empty one only says that nothing new comes
                screen.draw(lines.progress)
            lines.progress = None
        if is_over and not texts:
            break
        is_over = is_over or any(key.data is None for key, _ in ready)
    for key in selector.get_map().values():
        if key.data is not None:
            out.write(key.data.end())
    out.flush()
