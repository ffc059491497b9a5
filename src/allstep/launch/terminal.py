"""The supervisor's own standard output and error: what it says, and what it passes on of the ranks.

Contract: lives as long as the run. Nothing written here ever makes the loop wait: what a slow reader has no room for
is kept, `adjust` (called before each wait) asks the loop to tell when there is room again, and `congested` says that
so much waits that the ranks' pipes should not be read meanwhile. A reader that goes away is said once; the run goes on.
"""

from __future__ import annotations

import os
import selectors
from collections.abc import Mapping

from allstep.launch.loop import Loop
from allstep.launch.outlet import Outlet
from allstep.launch.rank_output import Stream

_BACKLOG = 1 << 20


class Terminal:
    """Both outlets of a run.

    Args:
        loop: the run's loop.
        environ: the supervisor's environment (NO_COLOR is looked at).
    """

    def __init__(self, loop: Loop, environ: Mapping[str, str]) -> None:
        self.outlets: dict[Stream, Outlet] = {"stdout": Outlet(1), "stderr": Outlet(2)}
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


def _coloured(outlets: Mapping[Stream, Outlet], environ: Mapping[str, str]) -> frozenset[Stream]:
    if environ.get("NO_COLOR"):
        return frozenset()
    return frozenset(stream for stream, outlet in outlets.items() if os.isatty(outlet.fd))
