"""Storages that misbehave, and states to save: what the tests of this folder share."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from allstep.checkpoint import Buffer, LocalStorage, Store, entries


def some_state(seed: int = 0) -> dict[str, Any]:
    """A trained model with its optimizer, and plain values."""
    generator = torch.Generator().manual_seed(seed)
    model = {f"layer{at}.weight": torch.randn(17, 5 + at, generator=generator) for at in range(4)}
    moments = {at: {"step": torch.tensor(float(seed)), "exp_avg": torch.randn(17, 5 + at)} for at in range(4)}
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1, 2, 3]}]
    return {"model": model, "optimizer": {"state": moments, "param_groups": groups}, "trainer": {"iteration": seed}}


def states(folder: Path) -> dict[str, str]:
    """The state of each checkpoint in a folder, by name."""
    return {entry.name: entry.state for entry in entries(str(folder))}


def listed(folder: Path) -> list[str]:
    """What is in a folder of checkpoints but whose it is."""
    return sorted(name for name in os.listdir(folder) if name != "owner")


def newest(folder: Path) -> dict[str, Any]:
    """The state in the newest checkpoint."""
    store = Store(str(folder))
    found = store.choose()
    assert found is not None
    return store.load(found).state


def flip(path: Path, at: int) -> None:
    """Flip a bit of a file's byte `at`, which may count from the end."""
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def truncate(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


class Recording(LocalStorage):
    """Notes what is asked of it."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.calls: list[str] = []

    def make_folder(self, folder: str) -> None:
        self.calls.append("make_folder")
        super().make_folder(folder)

    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        self.calls.append(f"write {name}")
        super().write(folder, name, blocks)

    def sync_folder(self, folder: str) -> None:
        self.calls.append("sync_folder")
        super().sync_folder(folder)

    def rename(self, folder: str, final: str) -> None:
        self.calls.append("rename")
        super().rename(folder, final)

    def remove_folder(self, folder: str) -> None:
        self.calls.append(f"remove {folder}")
        super().remove_folder(folder)


class Gated(LocalStorage):
    """Writes nothing until it is let."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.gate = threading.Event()

    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        assert self.gate.wait(60)
        super().write(folder, name, blocks)


class Failing(LocalStorage):
    """Raises when a file of a certain name is written, for as long as `failing`."""

    def __init__(self, root: str, name: str) -> None:
        super().__init__(root)
        self.name = name
        self.failing = True

    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        if self.failing and name == self.name:
            raise OSError(5, "the disk is on fire")
        super().write(folder, name, blocks)


class Unreadable(LocalStorage):
    """Raises when a file of a certain name in a certain folder is opened, so many times."""

    def __init__(self, root: str, folder: str, name: str, times: int, reason: int = errno.EIO) -> None:
        super().__init__(root)
        self.folder = folder
        self.name = name
        self.times = times
        self.reason = reason

    def open(self, folder: str, name: str) -> BinaryIO:
        if (folder, name) == (self.folder, self.name) and self.times > 0:
            self.times -= 1
            raise OSError(self.reason, "the server is away")
        return super().open(folder, name)


class Deadly(LocalStorage):
    """Kills its process at the n-th moment of its life.

    Moments are before and after each call that changes something, and in the middle of each file, after half of its
    bytes.
    """

    def __init__(self, root: str, moment: int) -> None:
        super().__init__(root)
        self._left = moment

    def _pass(self) -> None:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    @property
    def survived(self) -> bool:
        """Whether there are fewer moments than that."""
        return self._left >= 0

    def make_folder(self, folder: str) -> None:
        self._pass()
        super().make_folder(folder)
        self._pass()

    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        self._pass()
        super().write(folder, name, self._halved(blocks))
        self._pass()

    def _halved(self, blocks: Iterable[Buffer]) -> Iterable[Buffer]:
        for block in blocks:
            middle = len(block) // 2
            yield block[:middle]
            self._pass()
            yield block[middle:]

    def sync_folder(self, folder: str) -> None:
        self._pass()
        super().sync_folder(folder)

    def rename(self, folder: str, final: str) -> None:
        self._pass()
        os.rename(os.path.join(self.root, folder), os.path.join(self.root, final))
        self._pass()  # after the rename and before the folder is synchronised
        super().sync_folder(".")

    def remove_file(self, folder: str, name: str) -> None:
        self._pass()
        super().remove_file(folder, name)
        self._pass()

    def remove_folder(self, folder: str) -> None:
        for name in sorted(self.files(folder)):
            self._pass()
            os.unlink(os.path.join(self.root, folder, name))
        super().remove_folder(folder)
