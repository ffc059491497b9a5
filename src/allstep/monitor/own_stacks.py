"""The stacks of this process: on request, and left in a file when the process cannot answer.

`own_stacks` gives the stacks of all threads. It needs the interpreter lock, as all Python code does.

`StacksTimer` is for a rank whose lock is held. `faulthandler` has one timer in a process, which needs no lock; while a
rank has a stacks file, the timer is its. The rank winds it up with each heartbeat, so that it runs out only when the
heartbeats stop, and then it writes the stacks to the file. It stands still while the process forks: the interpreter of
a child waits at its end for the timer's thread, which a child does not have.

The rank tells its monitor the file's address. Any process of the same user on the same machine can read it with
`read_stacks`, for as long as the rank lives. It is in memory and in no folder, so nothing is left however the rank
ends. The address has the file's name, which no other file has, so that it is not mistaken on another machine. Where a
system has no such files, there is none.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import tempfile
import threading
import weakref
from collections.abc import Callable
from typing import BinaryIO

from allstep.diagnosis.stacks import without_current_thread

WITHOUT_HEARTBEAT_S = 2.0
"""Seconds without a heartbeat after which the stacks are written to the file."""

_DESCRIPTOR = re.compile(r"/proc/[0-9]+/fd/[0-9]+")  # of a process: nobody can plant a link of that name
_LARGEST = 256 << 10  # bytes of stacks that are read


def own_stacks() -> str:
    """The stacks of all threads but the one that asks.

    Raises:
        OSError: there is no file to write them to.
    """
    with _scratch() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return without_current_thread(file.read(_LARGEST).decode(errors="replace"))


def _scratch() -> BinaryIO:
    """A file that ends with its descriptor: in memory, since the folder for temporary files may be full or missing."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("allstep-own-stacks"), "w+b")
    return tempfile.TemporaryFile()


class StacksTimer:
    """Writes the stacks of all threads to a file when `wind_up` was not called for `WITHOUT_HEARTBEAT_S`.

    Attributes:
        address: of the file, for `read_stacks`; empty where there can be none, and then the timer does nothing.
    """

    def __init__(self) -> None:
        self.address = ""
        self._descriptor: int | None = None
        self._runs = False
        self._is_forking = threading.Lock()
        with contextlib.suppress(OSError):
            self._descriptor, self.address = make_stacks_file()
        itself = weakref.ref(self)  # what is registered stays registered for the life of the process
        os.register_at_fork(
            before=lambda: _tell(itself(), StacksTimer._before_fork),
            after_in_parent=lambda: _tell(itself(), StacksTimer._after_fork),
            after_in_child=lambda: _tell(itself(), StacksTimer._forget),
        )

    def wind_up(self) -> None:
        """Begin to count again, and forget stacks of a time that is over.

        Where that fails there are none from now on: the script may have closed the descriptor, and another file can
        then get its number.
        """
        with self._is_forking:
            self._wind_up()

    def _before_fork(self) -> None:
        self._is_forking.acquire()  # the thread that sends heartbeats would wind it up in between
        if self._runs:
            faulthandler.cancel_dump_traceback_later()

    def _after_fork(self) -> None:
        if self._runs:
            self._wind_up()
        self._is_forking.release()

    def _forget(self) -> None:
        """Leave the timer and its file to the process that this one was forked from."""
        self._is_forking, self._runs, self._descriptor = threading.Lock(), False, None

    def _wind_up(self) -> None:
        if self._descriptor is None:
            return
        try:
            if os.fstat(self._descriptor).st_size:
                faulthandler.cancel_dump_traceback_later()  # one that is being written would go on behind the cut
                os.ftruncate(self._descriptor, 0)
                os.lseek(self._descriptor, 0, os.SEEK_SET)
            faulthandler.dump_traceback_later(WITHOUT_HEARTBEAT_S, repeat=False, file=self._descriptor)
            self._runs = True
        except (OSError, RuntimeError):  # RuntimeError: no thread for the timer
            self._descriptor = None

    def close(self) -> None:
        """Stop counting."""
        if self._runs:
            faulthandler.cancel_dump_traceback_later()
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        self._runs, self._descriptor = False, None


def _tell(timer: StacksTimer | None, act: Callable[[StacksTimer], None]) -> None:
    if timer is not None:
        act(timer)


def make_stacks_file() -> tuple[int, str]:
    """Make a file for this process: its descriptor and address.

    Raises:
        OSError: there can be none.
    """
    if not hasattr(os, "memfd_create") or not os.path.exists("/proc/self/fd"):
        raise OSError("a file in memory that others can read takes Linux")
    name = f"allstep-stacks-{os.urandom(8).hex()}"
    descriptor = os.memfd_create(name)
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}/{name}"


def read_stacks(address: str) -> str:
    """The last stacks in a rank's file; empty where there are none, or no such file here."""
    link, _, name = address.rpartition("/")
    try:
        # The number may be another file's by now, or another process' on another machine: only the name tells.
        if not name or not _DESCRIPTOR.fullmatch(link) or not os.readlink(link).startswith(f"/memfd:{name}"):
            return ""
        with open(link, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _LARGEST))
            return file.read(_LARGEST).decode(errors="replace")
    except OSError:
        return ""
