"""What seeding random augmentation costs, in each mode of `sample_seeding`.

The dataset hands out rows of a tensor, so what differs between the modes is the seeding. Batches of 64 samples; time
per sample of an epoch, the minimum of several. Modes take turns in each round. With `--hugging-face` the same rows come
from a dataset of Hugging Face's `datasets`, which has to be installed and gives whole batches.

    python benchmarks/sample_seeding.py [--samples 12800] [--rounds 7] [--hugging-face]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from torch.utils.data import Dataset

from allstep.data import Loader, make_loader

from machine import machine_line

BATCH = 64
MODES = ("off", "batch", "sample")


class Rows(Dataset[torch.Tensor]):
    """Rows of a tensor: about the cheapest dataset there is."""

    def __init__(self, length: int) -> None:
        self.rows = torch.zeros(length, 8)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def hugging_face_rows(length: int) -> Any:
    """The same rows from Hugging Face's library, as tensors."""
    import datasets

    return datasets.Dataset.from_dict({"row": torch.zeros(length, 8).tolist()}).with_format("torch")


def epoch_seconds(loader: Loader) -> float:
    iterator = iter(loader)
    next(iterator)  # workers are up
    begin = time.perf_counter()
    for _ in iterator:
        pass
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=200 * BATCH)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hugging-face", action="store_true", help="rows of a Hugging Face dataset, without workers")
    arguments = parser.parse_args()
    print(machine_line(), end="\n\n")
    print("| workers | " + " | ".join(f"{mode}, µs per sample" for mode in MODES) + " |")
    print("| ---: | " + " | ".join("---:" for _ in MODES) + " |")
    rows = hugging_face_rows(arguments.samples) if arguments.hugging_face else Rows(arguments.samples)
    for workers in (0,) if arguments.hugging_face else (0, 1):
        loaders = [
            make_loader(rows, rank=0, world_size=1, seed=1, batch_size=BATCH, sample_seeding=mode, num_workers=workers)
            for mode in MODES
        ]
        best = [float("inf")] * len(MODES)
        for _ in range(arguments.rounds):
            best = [min(old, epoch_seconds(loader)) for old, loader in zip(best, loaders, strict=True)]
        print(f"| {workers} | " + " | ".join(f"{one / (arguments.samples - BATCH) * 1e6:.1f}" for one in best) + " |")


if __name__ == "__main__":
    main()
