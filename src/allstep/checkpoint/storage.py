"""Where checkpoints lie: the few things that are asked of a file system, for a local one.

Contract: a `Storage` is rooted at the folder that holds checkpoints and is asked only for folders directly in it and
files directly in those. What `write` has returned from, and what `rename` has, survives the machine's end: files and
folders are synchronised. `FsspecStorage`, beside this file, does the same for object stores, which have no rename;
there the manifest's arrival makes the checkpoint. What can go wrong: OSError, as the operating system gives it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

from allstep.checkpoint.hashing import Buffer


class Storage(Protocol):
    """A folder of checkpoints."""

    root: str
    has_rename: bool

    def folders(self) -> list[str]:
        """Names of the folders here; none where the root does not exist."""

    def files(self, folder: str) -> dict[str, int]:
        """Names and sizes of the files in a folder; none where it does not exist."""

    def make(self, folder: str) -> None:
        """Make a new folder. Raises FileExistsError where one is there."""

    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        """Write a new file, durably."""

    def open(self, folder: str, name: str) -> BinaryIO:
        """Open a file for reading."""

    def settle(self, folder: str) -> None:
        """Make the list of a folder's files durable."""

    def rename(self, folder: str, final: str) -> None:
        """Give a folder its final name, durably. Raises OSError where that is taken."""

    def remove_file(self, folder: str, name: str) -> None:
        """Remove a file, where it exists."""

    def remove(self, folder: str) -> None:
        """Remove a folder with what is in it."""

    def free(self) -> int | None:
        """Bytes that can still be written; None where nobody knows."""


class LocalStorage:
    """A folder in a file system that has rename and fsync."""

    has_rename = True

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self._path = Path(self.root)

    def folders(self) -> list[str]:
        """See `Storage`."""
        try:
            with os.scandir(self._path) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def files(self, folder: str) -> dict[str, int]:
        """See `Storage`."""
        try:
            with os.scandir(self._path / folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}

    def make(self, folder: str) -> None:
        """See `Storage`. The root is made too."""
        missing = [path for path in (self._path, *self._path.parents) if not path.is_dir()]
        self._path.mkdir(parents=True, exist_ok=True)
        for path in missing:
            _sync(path.parent)
        (self._path / folder).mkdir()

    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        """See `Storage`."""
        with open(self._path / folder / name, "xb", buffering=0) as file:
            for block in blocks:
                _write_all(file.fileno(), block)
            os.fsync(file.fileno())

    def open(self, folder: str, name: str) -> BinaryIO:
        """See `Storage`."""
        return open(self._path / folder / name, "rb")

    def settle(self, folder: str) -> None:
        """See `Storage`."""
        _sync(self._path / folder)

    def rename(self, folder: str, final: str) -> None:
        """See `Storage`."""
        if (self._path / final).exists():  # rename would replace an empty folder
            raise FileExistsError(errno.EEXIST, "a checkpoint of this name exists", str(self._path / final))
        os.rename(self._path / folder, self._path / final)
        _sync(self._path)

    def remove_file(self, folder: str, name: str) -> None:
        """See `Storage`."""
        (self._path / folder / name).unlink(missing_ok=True)
        _sync(self._path / folder)

    def remove(self, folder: str) -> None:
        """See `Storage`."""
        shutil.rmtree(self._path / folder)

    def free(self) -> int | None:
        """See `Storage`; asked of the nearest folder that exists."""
        path = self._path
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free


def _write_all(descriptor: int, block: Buffer) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system whose folders cannot be synchronised
            raise
    finally:
        os.close(descriptor)
