"""Where checkpoints lie: the few things that are asked of a file system, for a local one.

Contract: a `Storage` is rooted at the folder that holds checkpoints and is asked only for folders directly in it and
files directly in those. What `write` has returned from, and what `rename` has, survives the machine's end: files and
folders are synchronised. `FsspecStorage`, beside this file, does the same for object stores, which have no rename;
there the manifest's arrival makes the checkpoint. What can go wrong: OSError, as the operating system gives it.

The hash of a checkpoint's files, taken while they are written or read.

Contract: XXH3 with 128 bits, which notices truncation and flipped bits at the speed of memory. It is no defence against
somebody who forges a checkpoint: that nothing in one is ever executed is.

Checkpoints in any place that fsspec reaches: `s3://`, `gs://`, `memory://` and the like.

Contract: as `Storage`, without rename: an object is there, whole, once its writing has ended. Lists are always asked
for anew. `open_storage` chooses: a path, or `file://`, is local; any other address is fsspec's. What can go wrong:
CheckpointError where the address' protocol needs a package that is not installed.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import xxhash

from allstep.errors import CheckpointError


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


ALGORITHM = "xxh3_128"
BLOCK = 4 << 20

Buffer = bytes | memoryview


class Hashed:
    """Passes blocks of bytes on and knows the size and the hash of those that it passed."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self.size = 0

    def blocks(self, *parts: Buffer) -> Iterator[Buffer]:
        """The bytes of all parts, in blocks."""
        for part in parts:
            view = memoryview(part)
            for start in range(0, view.nbytes, BLOCK):
                block = view[start : start + BLOCK]
                self._hash.update(block)
                self.size += block.nbytes
                yield block

    @property
    def hexdigest(self) -> str:
        """The hash of what was passed on so far."""
        return str(self._hash.hexdigest())


def hash_bytes(data: bytes) -> str:
    """The hash of bytes at hand."""
    return str(xxhash.xxh3_128(data).hexdigest())


def hash_file(file: BinaryIO) -> tuple[int, str]:
    """Size and hash of an open file, from where it stands to its end."""
    digest, size = xxhash.xxh3_128(), 0
    while block := file.read(BLOCK):
        digest.update(block)
        size += len(block)
    return size, str(digest.hexdigest())


def open_storage(root: str) -> Storage:
    """The storage at a path or an address.

    Raises:
        CheckpointError: the address is one that fsspec does not know, or has lost a slash in a `Path`.
    """
    protocol, _, rest = root.partition(":/")
    if rest and not rest.startswith("/") and _is_protocol(protocol):
        raise CheckpointError(f"{root} has lost a slash, as addresses in a Path do; give {protocol}://{rest} as a str")
    if root.startswith("file://"):
        return LocalStorage(root.removeprefix("file://"))
    return FsspecStorage(root) if "://" in root else LocalStorage(root)


class FsspecStorage:
    """A folder in an fsspec file system."""

    has_rename = False

    def __init__(self, root: str) -> None:
        import fsspec  # type: ignore[import-untyped]

        self.root = root.rstrip("/")
        try:
            self._fs, self._path = cast(tuple[Any, str], fsspec.core.url_to_fs(self.root))
        except (ImportError, ValueError) as error:
            raise CheckpointError(
                f"checkpoints cannot be kept at {root}: {error}; install the package that fsspec names, "
                "for s3:// with pip install allstep[s3]"
            ) from error

    def folders(self) -> list[str]:
        """See `Storage`."""
        return sorted(_last(info) for info in self._list(self._path) if info["type"] == "directory")

    def files(self, folder: str) -> dict[str, int]:
        """See `Storage`."""
        infos = self._list(f"{self._path}/{folder}")
        return {_last(info): int(info["size"]) for info in infos if info["type"] == "file"}

    def make(self, folder: str) -> None:
        """See `Storage`. Nothing is made where folders are but the beginnings of names."""
        if self.files(folder):
            raise FileExistsError(errno.EEXIST, "a checkpoint of this name exists", f"{self.root}/{folder}")
        if _has_folders(self._fs):
            self._fs.makedirs(f"{self._path}/{folder}", exist_ok=True)

    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        """See `Storage`."""
        with self._fs.open(f"{self._path}/{folder}/{name}", "wb") as file:
            for block in blocks:
                file.write(block)

    def open(self, folder: str, name: str) -> BinaryIO:
        """See `Storage`."""
        return cast(BinaryIO, self._fs.open(f"{self._path}/{folder}/{name}", "rb"))

    def settle(self, folder: str) -> None:
        """See `Storage`. An object is durable when it is there."""

    def rename(self, folder: str, final: str) -> None:
        """Not to be called."""
        raise NotImplementedError("object stores have no rename; the manifest's arrival commits")

    def remove_file(self, folder: str, name: str) -> None:
        """See `Storage`."""
        if name in self.files(folder):
            self._fs.rm_file(f"{self._path}/{folder}/{name}")

    def remove(self, folder: str) -> None:
        """See `Storage`."""
        self._fs.rm(f"{self._path}/{folder}", recursive=True)

    def free(self) -> int | None:
        """See `Storage`. Object stores do not say."""
        return None

    def _list(self, path: str) -> list[dict[str, Any]]:
        self._fs.invalidate_cache()
        try:
            return [info for info in self._fs.ls(path, detail=True) if _last(info) and info["name"] != path]
        except (FileNotFoundError, NotADirectoryError):
            return []


def _is_protocol(name: str) -> bool:
    if not name.isalnum():
        return False
    import fsspec

    return name in fsspec.available_protocols()


def _last(info: dict[str, Any]) -> str:
    return str(info["name"]).rstrip("/").rsplit("/", 1)[-1]


def _has_folders(fs: Any) -> bool:
    return bool({"memory", "file", "local"} & set((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol))
