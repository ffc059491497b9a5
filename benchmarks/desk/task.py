"""The job that all scripts of this folder do: a small language model over bytes. What they share, and nobody's lines.

Data are the sources of Python's own library, cut into pieces; the model is a transformer of one layer with dropout. The
schedule is a cosine with a warm-up, in optimizer steps. `Options` are the numbers that `compare.py` may make smaller.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

LENGTH, BATCH, ACCUMULATE, WARM_UP, RATE, CLIP, PATIENCE = 32, 8, 4, 5, 3e-3, 1.0, 3


@dataclass(frozen=True)
class Options:
    """Where to write, and iterations: in all, and from one evaluation, checkpoint and line to the next."""

    out: Path
    iterations: int
    evaluate: int
    save: int
    tell: int

    @classmethod
    def read(cls) -> Options:
        """From the command line."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--out", type=Path, default=Path("out"))
        for name, default in (("iterations", 600), ("evaluate", 200), ("save", 100), ("tell", 20)):
            parser.add_argument(f"--{name}", type=int, default=default)
        return cls(**vars(parser.parse_args()))


class Pieces(Dataset[torch.Tensor]):
    """Pieces of a text, each of LENGTH bytes and the one that follows."""

    def __init__(self, text: torch.Tensor) -> None:
        self.text = text

    def __len__(self) -> int:
        return (len(self.text) - 1) // LENGTH

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.text[index * LENGTH : (index + 1) * LENGTH + 1]


def datasets() -> tuple[Pieces, Pieces]:
    """What is trained on, and what is evaluated."""
    files = sorted(Path(os.__file__).parent.glob("[a-e]*.py"))
    content = b"".join(file.read_bytes() for file in files)[:200_000]
    text = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    return Pieces(text[:-8_000]), Pieces(text[-8_000:])


class LanguageModel(nn.Module):
    """Bytes so far to scores of the next byte."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        embedded = self.bytes(text) + self.places.weight
        return self.head(self.layer(embedded, src_mask=self.mask, is_causal=True))


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of the next byte."""
    scores = model(batch[:, :-1])
    return functional.cross_entropy(scores.float().flatten(0, 1), batch[:, 1:].flatten())


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Weight decay for matrices only."""
    matrices = [each for each in model.parameters() if each.dim() > 1]
    others = [each for each in model.parameters() if each.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def cosine(steps: int, total: int) -> float:
    """What the learning rate is multiplied by after so many optimizer steps of `total`."""
    if steps < WARM_UP:
        return (steps + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (steps - WARM_UP) / max(1, total - WARM_UP))))


def digest(model: nn.Module) -> str:
    """A fingerprint of the parameters, to the last bit."""
    content = b"".join(each.detach().cpu().numpy().tobytes() for each in model.parameters())
    return hashlib.sha256(content).hexdigest()[:16]
