"""Where checkpoints lie: the few things that are asked of a file system, and the hash of what is written.

Contract: `open_storage` gives the `Storage` of a path or an address. A `Storage` is rooted at the folder that holds
all checkpoints of a run. It is asked only for folders directly in that root and for files directly in those.

`LocalStorage` is durable: what `write` and `rename` have returned from survives a loss of power, because files and
folders are synchronised. `FsspecStorage` reaches `s3://`, `gs://`, `memory://` and what else fsspec knows. It has no
rename; an object is there, whole, once its writing has ended, and the arrival of the manifest commits a checkpoint.

Files are hashed while they are written and read, with XXH3 of 128 bits. That finds truncation and flipped bits at the
speed of memory. It is no defence against forgery; against that stands that nothing in a checkpoint is executed.

Small files that several jobs may want at once are made with `create_file`, which only one of them can do, and changed
with `replace_file`; whoever reads one finds it whole. A place that cannot tell who was first says so with
`creates_exclusively`.

What can go wrong: OSError as the operating system gives it, errors of the file systems behind fsspec, and
CheckpointError where an address needs a package that is not installed. Imports no torch.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import xxhash

from allstep.errors import ArgumentError, CheckpointError

HASH_ALGORITHM = "xxh3_128"
BLOCK_SIZE = 4 << 20  # bytes: small enough to stay in a processor's cache between the hash and the write

Buffer = bytes | memoryview
"""A block of a file, as `Storage.write` is given it."""


def open_storage(root: str) -> Storage:
    """The storage at a path or an address. A path and `file://` are local; any other address is fsspec's.

    Raises:
        ArgumentError: the address has lost a slash in a `Path`.
        CheckpointError: fsspec does not know the address, or lacks the package for it.
    """
    protocol, _, rest = root.partition(":/")
    if rest and not rest.startswith("/") and _is_protocol(protocol):
        # Path("s3://bucket") is "s3:/bucket", which would otherwise become a local folder of that name.
        raise ArgumentError(f"{root} has lost a slash, as addresses in a Path do; give {protocol}://{rest} as a str")
    if root.startswith("file://"):
        return LocalStorage(root.removeprefix("file://"))
    return FsspecStorage(root) if "://" in root else LocalStorage(root)


def _is_protocol(name: str) -> bool:
    if not name.isalnum():
        return False
    import fsspec  # type: ignore[import-untyped]

    return name in fsspec.available_protocols()


class Storage(Protocol):
    """A folder of checkpoints."""

    root: str
    has_rename: bool
    creates_exclusively: bool

    def folders(self) -> list[str]:
        """Names of the folders here; none where the root does not exist."""

    def files(self, folder: str) -> dict[str, int]:
        """Names of the files in a folder, with their sizes in bytes; none where the folder does not exist."""

    def make_folder(self, folder: str) -> None:
        """Make a new folder. Raises FileExistsError where one is there."""

    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        """Write a new file, durably."""

    def create_file(self, folder: str, name: str, data: bytes) -> None:
        """Write a small file, whole at once; the folder is made too. Raises FileExistsError where there is one."""

    def replace_file(self, folder: str, name: str, data: bytes) -> None:
        """Write a small file, whole at once, in place of what is there."""

    def open(self, folder: str, name: str) -> BinaryIO:
        """Open a file for reading."""

    def sync_folder(self, folder: str) -> None:
        """Make the list of a folder's files durable."""

    def rename(self, folder: str, final: str) -> None:
        """Give a folder its final name, durably. Raises OSError where that is taken."""

    def remove_file(self, folder: str, name: str) -> None:
        """Remove a file, where it exists."""

    def remove_folder(self, folder: str) -> None:
        """Remove a folder with what is in it."""

    def free_bytes(self) -> int | None:
        """Bytes that can still be written; None where that is unknown."""


class BlockHasher:
    """Hashes blocks of bytes on their way to a file, and counts them."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self.size = 0

    def blocks(self, *parts: Buffer) -> Iterator[Buffer]:
        """The bytes of all parts, in blocks; each is counted and hashed before it is given out."""
        for part in parts:
            view = memoryview(part)
            for start in range(0, view.nbytes, BLOCK_SIZE):
                block = view[start : start + BLOCK_SIZE]
                self._hash.update(block)
                self.size += block.nbytes
                yield block

    @property
    def hexdigest(self) -> str:
        """The hash of the blocks so far."""
        return str(self._hash.hexdigest())


def hash_bytes(data: bytes) -> str:
    """The hash of bytes in memory."""
    return str(xxhash.xxh3_128(data).hexdigest())


def hash_file(file: BinaryIO) -> str:
    """The hash of an open file, from its position to its end."""
    digest = xxhash.xxh3_128()
    while block := file.read(BLOCK_SIZE):
        digest.update(block)
    return str(digest.hexdigest())


def in_words(error: Exception, root: str) -> str:
    """Why something could not be written below `root`, with what to do where the operating system's word hides it."""
    said = f"{type(error).__name__}: {error}"
    remedy = _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    return said if remedy is None else f"{remedy.format(root=root)} ({said})"


_REMEDIES = {
    errno.ENOSPC: "the disk of {root} has no room left, or no inodes for new files (df, df -i); free some, or keep "
    "fewer checkpoints",
    errno.EDQUOT: "the quota for {root} is used up; free some of it, or keep fewer checkpoints",
    errno.EFBIG: "a file in {root} would be larger than this process may write (ulimit -f), or than the file system "
    "takes; raise the limit, or save on more ranks, which write a file each",
    errno.EROFS: "{root} is mounted for reading only; choose another folder for checkpoints",
    errno.EACCES: "this user may not write to {root}; choose another folder, or have its permissions changed",
    errno.EPERM: "this user may not write to {root}; choose another folder, or have its permissions changed",
}


class LocalStorage:
    """A folder in a file system that has rename and fsync."""

    has_rename = True
    creates_exclusively = True

    def __init__(self, root: str) -> None:
        self.root = str(Path(root).absolute())  # `link/..` stays what the kernel takes it for
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

    def make_folder(self, folder: str) -> None:
        """See `Storage`. The root is made too."""
        # A new folder survives a loss of power only once its parent is synchronised, so each new level is.
        missing = [path for path in (self._path, *self._path.parents) if not path.is_dir()]
        self._path.mkdir(parents=True, exist_ok=True)
        for path in missing:
            _sync(path.parent)
        (self._path / folder).mkdir()

    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        """See `Storage`."""
        # Unbuffered: the blocks are large, and a buffer would copy each once more. "x": a file is written once.
        with open(self._path / folder / name, "xb", buffering=0) as file:
            for block in blocks:
                _write_all(file.fileno(), block)
            os.fsync(file.fileno())

    def create_file(self, folder: str, name: str, data: bytes) -> None:
        """See `Storage`."""
        (self._path / folder).mkdir(parents=True, exist_ok=True)
        final = self._path / folder / name
        with self._beside(folder, name, data) as temporary:
            try:
                os.link(temporary, final)
            except FileExistsError:
                # Over NFS an answer may be lost, and the call that is made again then meets its own work.
                if os.stat(temporary).st_nlink != 2:
                    raise
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                with open(final, "xb") as file:
                    file.write(data)
        _sync(self._path / folder)

    def replace_file(self, folder: str, name: str, data: bytes) -> None:
        """See `Storage`."""
        with self._beside(folder, name, data) as temporary:
            os.replace(temporary, self._path / folder / name)

    @contextmanager
    def _beside(self, folder: str, name: str, data: bytes) -> Iterator[Path]:
        """A new file with this content beside where it is to be, for as long as it is not moved."""
        path = self._path / folder / f".{name}.{secrets.token_hex(8)}"
        try:
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    def open(self, folder: str, name: str) -> BinaryIO:
        """See `Storage`."""
        return open(self._path / folder / name, "rb")

    def sync_folder(self, folder: str) -> None:
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

    def remove_folder(self, folder: str) -> None:
        """See `Storage`."""
        shutil.rmtree(self._path / folder)

    def free_bytes(self) -> int | None:
        """See `Storage`; asked of the nearest folder that exists."""
        path = self._path
        while not path.exists():
            path = path.parent
        if not hasattr(os, "statvfs"):
            return shutil.disk_usage(path).free
        usage = os.statvfs(path)
        # Some network file systems count no blocks at all, which says nothing of what can be written.
        return usage.f_bavail * usage.f_frsize if usage.f_blocks else None


_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # of file systems that know no hard links


def _write_all(descriptor: int, block: Buffer) -> None:
    view = memoryview(block)
    while view:  # os.write may take a part of it only
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


class FsspecStorage:
    """A folder in an fsspec file system."""

    has_rename = False
    creates_exclusively = True  # until it is seen not to

    def __init__(self, root: str) -> None:
        import fsspec

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

    def make_folder(self, folder: str) -> None:
        """See `Storage`. In an object store a folder is only the beginning of names, and nothing is made."""
        if self.files(folder):
            raise FileExistsError(errno.EEXIST, "a checkpoint of this name exists", f"{self.root}/{folder}")
        if _has_folders(self._fs):
            self._fs.makedirs(f"{self._path}/{folder}", exist_ok=True)

    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        """See `Storage`."""
        with self._fs.open(f"{self._path}/{folder}/{name}", "wb") as file:
            for block in blocks:
                file.write(block)

    def create_file(self, folder: str, name: str, data: bytes) -> None:
        """See `Storage`. Where the file system behind knows no such write, the last of two that write at once wins."""
        path = f"{self._path}/{folder}/{name}"
        if name in self.files(folder):
            raise FileExistsError(errno.EEXIST, "there is one already", path)
        if _has_folders(self._fs):
            self._fs.makedirs(f"{self._path}/{folder}", exist_ok=True)
        if self._create(path, data):
            # The same again has to fail: file systems take the word and differ in what they make of it.
            self.creates_exclusively = not self._create(path, data)
        else:
            raise FileExistsError(errno.EEXIST, "somebody else has just made it", path)

    def _create(self, path: str, data: bytes) -> bool:
        """Write a file where there is none; return whether that was so."""
        try:
            self._fs.pipe_file(path, data, mode="create")
        except TypeError:  # it knows no mode
            self._fs.pipe_file(path, data)
        except FileExistsError:
            return False
        except OSError:
            self._fs.invalidate_cache()
            if not self._fs.exists(path):
                raise
            return False  # how an object store says that its condition was not met
        return True

    def replace_file(self, folder: str, name: str, data: bytes) -> None:
        """See `Storage`."""
        self._fs.pipe_file(f"{self._path}/{folder}/{name}", data)

    def open(self, folder: str, name: str) -> BinaryIO:
        """See `Storage`."""
        return cast(BinaryIO, self._fs.open(f"{self._path}/{folder}/{name}", "rb"))

    def sync_folder(self, folder: str) -> None:
        """See `Storage`. An object is durable when it is there."""

    def rename(self, folder: str, final: str) -> None:
        """Not to be called: `has_rename` is false."""
        raise NotImplementedError("object stores have no rename; the manifest's arrival commits")

    def remove_file(self, folder: str, name: str) -> None:
        """See `Storage`."""
        if name in self.files(folder):
            self._fs.rm_file(f"{self._path}/{folder}/{name}")

    def remove_folder(self, folder: str) -> None:
        """See `Storage`."""
        self._fs.rm(f"{self._path}/{folder}", recursive=True)

    def free_bytes(self) -> int | None:
        """See `Storage`. Unknown for object stores."""
        return None

    def _list(self, path: str) -> list[dict[str, Any]]:
        # fsspec keeps listings; other processes write here, so each list is asked for anew.
        self._fs.invalidate_cache()
        try:
            return [info for info in self._fs.ls(path, detail=True) if _last(info) and info["name"] != path]
        except (FileNotFoundError, NotADirectoryError):
            return []


def _last(info: dict[str, Any]) -> str:
    # Some file systems end the names of folders with a slash.
    return str(info["name"]).rstrip("/").rsplit("/", 1)[-1]


def _has_folders(fs: Any) -> bool:
    return bool({"memory", "file", "local"} & set((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol))
