"""Gathered outputs as files: each rank writes a part, and whoever reads joins them in sample order.

Contract: every rank calls `write_part` with the same folder, which all of them see; afterwards a `Parts` reads them. A
part holds plain tensors only: in one safetensors file, or in a npy file each. What can go wrong: what file systems do,
and samples that no plain tensor holds (ValueError).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from allstep.metrics.samples import Column, Samples, flattened, in_order, restored

Format = Literal["safetensors", "npy"]
_PLACES = "places"


@dataclass(frozen=True, slots=True)
class Parts:
    """What ranks wrote into a folder.

    Attributes:
        folder: where the parts are.
        names: what was gathered.
        ranks: how many wrote a part.
        samples: in all parts together.
        format: of the files.
    """

    folder: Path
    names: tuple[str, ...]
    ranks: int
    samples: int
    format: Format

    @property
    def files(self) -> list[Path]:
        """All files, rank by rank."""
        return sorted(self.folder.glob(f"part-*-of-{self.ranks:05d}*.{self.format}"))

    def load(self) -> dict[str, Column]:
        """All samples in their order, in memory."""
        return in_order([self.part(rank) for rank in range(self.ranks)], self.names)

    def part(self, rank: int) -> Samples:
        """What one rank wrote."""
        stem = _stem(rank, self.ranks)
        if self.format == "safetensors":
            from safetensors.torch import load_file

            tensors = load_file(self.folder / f"{stem}.safetensors")
        else:
            found = self.folder.glob(f"{stem}.*.npy")
            tensors = {path.name[len(stem) + 1 : -len(".npy")]: torch.from_numpy(np.load(path)) for path in found}
        return Samples(tensors[_PLACES], {name: restored(name, tensors) for name in self.names})


def write_part(folder: Path, samples: Samples, rank: int, ranks: int, format: Format) -> None:
    """Write one rank's samples; npy files hold bfloat16 as float32."""
    tensors: dict[str, torch.Tensor] = {_PLACES: samples.places}
    for name, column in samples.columns.items():
        tensors |= flattened(name, column)
    folder.mkdir(parents=True, exist_ok=True)
    stem = _stem(rank, ranks)
    if format == "safetensors":
        _write_safetensors(folder / f"{stem}.safetensors", tensors)
        return
    for name, tensor in tensors.items():
        plain = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        np.save(folder / f"{stem}.{name}.npy", plain.numpy())


def _write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _stem(rank: int, ranks: int) -> str:
    return f"part-{rank:05d}-of-{ranks:05d}"
