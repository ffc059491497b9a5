"""What one place in a random order costs: `Permutation` at lengths from a thousand to 2^62.

One index is computed in Python, many at once in numpy; a length just above a power of two is the worst case, since
then about every second result is outside and walked on. The minimum of several repeats counts.

    python benchmarks/permutation.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np

from allstep.data import Permutation

from machine import machine_line

LENGTHS = {
    "1,024 (a table)": 1024,
    "10^6": 10**6,
    "2^20": 2**20,
    "2^20 + 1": 2**20 + 1,
    "10^9": 10**9,
    "2^61 + 1": 2**61 + 1,
    "2^62": 2**62,
}


def seconds(act: Callable[[], object], repeats: int = 7) -> float:
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        act()
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    print(machine_line(), end="\n\n")
    print("| length | to make one, µs | one index, µs | many indices, ns each |")
    print("| :--- | ---: | ---: | ---: |")
    for name, length in LENGTHS.items():
        permutation = Permutation(length, 1)
        some = range(0, length, length // 1000)
        many = np.arange(min(length, 2**20))
        make = seconds(lambda n=length: [Permutation(n, seed) for seed in range(100)]) / 100
        one = seconds(lambda p=permutation, places=some: [p[i] for i in places]) / len(some)
        each = seconds(lambda p=permutation, places=many: p(places)) / len(many)
        print(f"| {name} | {make * 1e6:.0f} | {one * 1e6:.1f} | {each * 1e9:.1f} |")


if __name__ == "__main__":
    main()
