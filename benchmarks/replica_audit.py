"""What an audit of a model's copies costs: hashing all parameters, beside a training step of the same model.

One process, since nothing of it waits for other ranks: the hash rides in a vote that is held anyway. A step is the
forward pass, the backward pass and AdamW over a batch. The two take turns, and the medians count.

    python benchmarks/replica_audit.py [--width 1024] [--batch 32] [--repetitions 30]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from allstep.engine.replica_audit import INTERVAL, BitSums

from machine import machine_line


def timed(call: Callable[[], object]) -> float:
    """Milliseconds that this thread had of a processor."""
    began = time.thread_time()
    call()
    return (time.thread_time() - began) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=30)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(asked.width, asked.width), nn.ReLU())]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(asked.batch, asked.width)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    def audit() -> None:
        BitSums(0, model.named_parameters()).hash()

    steps, audits = [], []
    for _ in range(asked.repetitions):
        steps.append(timed(step))
        audits.append(timed(audit))
    one_step, one_audit = statistics.median(steps[3:]), statistics.median(audits[3:])
    count = sum(each.numel() for each in model.parameters())
    print(f"{machine_line()}; {count / 1e6:.1f} million float32 parameters, batches of {asked.batch}, one thread")
    print(f"a step {one_step:.2f} ms, an audit {one_audit:.2f} ms: every {INTERVAL} iterations", end=" ")
    print(f"{one_audit / one_step / INTERVAL:.3%} of a step (aim: at most 1 %)")


if __name__ == "__main__":
    main()
