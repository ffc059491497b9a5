"""Checkpoints in any place that fsspec reaches: `s3://`, `gs://`, `memory://` and the like.

Contract: as `Storage`, without rename: an object is there, whole, once its writing has ended. Lists are always asked
for anew. `open_storage` chooses: a path, or `file://`, is local; any other address is fsspec's. What can go wrong:
CheckpointError where the address' protocol needs a package that is not installed.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any, BinaryIO, cast

from allstep.checkpoint.hashing import Buffer
from allstep.checkpoint.storage import LocalStorage, Storage
from allstep.errors import CheckpointError


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
