"""Gathered outputs as files: each rank writes a part, and whoever reads joins them in sample order.

Contract: every rank calls `write_part` with the same folder, which all of them see; afterwards a `Parts` reads them. A
part holds plain tensors only: in one safetensors file, or in a npy file each. "positions" says where its samples stand,
and the others are those of `flatten_column`. Parts that another run left in the folder are removed: each rank removes
those of its own number, and the last rank also those of ranks that there are no more. What can go wrong: what file
systems do, and samples that no plain tensor holds (ArgumentError).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

import numpy as np
import torch

from allstep.outputs.samples import Column, Samples, flatten_column, join_samples, restore_column

Format = Literal["safetensors", "npy"]
_POSITIONS = "positions"
_PART = re.compile(r"part-(\d{5})-of-\d{5}\..*(npy|safetensors)")


@dataclass(frozen=True, slots=True)
class Parts:
    """What ranks wrote into a folder.

    Attributes:
        folder: where the parts are.
        names: what was gathered.
        ranks: how many wrote a part.
        samples: in all parts together.
        format: of the files.
        has_indices: whether the samples' indices in the dataset are known.
    """

    folder: Path
    names: tuple[str, ...]
    ranks: int
    samples: int
    format: Format
    has_indices: bool

    @property
    def files(self) -> list[Path]:
        """All files, rank by rank."""
        return [file for rank in range(self.ranks) for file in self._files_of(rank)]

    def load(self) -> dict[str, Column]:
        """All samples in their order, in memory, as `Gather` gives them."""
        return join_samples([self.part(rank) for rank in range(self.ranks)], self.names, have_indices=self.has_indices)

    def part(self, rank: int) -> Samples:
        """What one rank wrote."""
        tensors: dict[str, torch.Tensor] = {}
        for path in self._files_of(rank):
            if self.format == "safetensors":
                from safetensors.torch import load_file

                tensors |= load_file(path)
            else:
                key = path.name[len(_stem(rank, self.ranks)) + 1 : -len(".npy")]
                tensors[unquote(key)] = torch.from_numpy(np.load(path))
        return Samples(tensors[_POSITIONS], {name: restore_column(name, tensors) for name in self.names})

    def _files_of(self, rank: int) -> list[Path]:
        return sorted(self.folder.glob(f"{_stem(rank, self.ranks)}.*{self.format}"))


def write_part(folder: Path, samples: Samples, rank: int, ranks: int, format: Format) -> None:
    """Write one rank's samples in the place of what is there; npy files hold bfloat16 as float32."""
    tensors: dict[str, torch.Tensor] = {_POSITIONS: samples.positions}
    for name, column in samples.columns.items():
        tensors |= flatten_column(name, column)
    # All ranks make it at once, and none waits for another.
    folder.mkdir(parents=True, exist_ok=True)
    _remove_earlier(folder, rank, ranks)
    stem = _stem(rank, ranks)
    if format == "safetensors":
        _write_safetensors(folder / f"{stem}.safetensors", tensors)
        return
    for name, tensor in tensors.items():
        # numpy has no bfloat16, and float32 holds each of its values.
        plain = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        np.save(folder / f"{stem}.{quote(name, safe=' ')}.npy", plain.numpy())


def _remove_earlier(folder: Path, rank: int, ranks: int) -> None:
    for path in folder.iterdir():
        found = _PART.fullmatch(path.name)
        # Each file is removed by one rank only; those of ranks beyond the present number have no rank of their own.
        if found is not None and (int(found[1]) == rank or (rank == ranks - 1 and int(found[1]) >= ranks)):
            path.unlink(missing_ok=True)


def _write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _stem(rank: int, ranks: int) -> str:
    return f"part-{rank:05d}-of-{ranks:05d}"
