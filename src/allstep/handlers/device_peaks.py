"""How many floating-point operations a second devices do at most: a table from their makers' data sheets.

Contract: numbers are of one device as torch counts devices, for matrix products in bf16 or fp16 with sums in fp32,
dense, without structured sparsity. `peak_flops` reads the table by the name that torch gives a device; None for one
that is not in it. A part that is sold with several clocks has the number of its data sheet.
"""

from __future__ import annotations

import re

import torch

from allstep.world import World

_TERA = 1e12

_PEAKS: tuple[tuple[str, float, str], ...] = (
    # All words of the first column are in the device's name; the first row that fits holds.
    ("GB200", 2500, "NVIDIA GB200 NVL72 data sheet: 5,000 with sparsity"),
    ("B200", 2250, "NVIDIA HGX B200 data sheet: 4,500 with sparsity"),
    ("GH200", 989, "NVIDIA GH200 data sheet: 1,979 with sparsity"),
    ("H200 NVL", 835, "NVIDIA H200 data sheet: 1,671 with sparsity"),
    ("H200", 989, "NVIDIA H200 data sheet: 1,979 with sparsity"),
    ("H100 NVL", 835, "NVIDIA H100 NVL data sheet: 1,671 with sparsity"),
    ("H100 PCIe", 756, "NVIDIA H100 data sheet: 1,513 with sparsity"),
    ("H100", 989, "NVIDIA H100 data sheet, SXM: 1,979 with sparsity"),
    ("H800", 989, "as H100 SXM, which it differs from in links and fp64"),
    ("A100", 312, "NVIDIA A100 data sheet"),
    ("A800", 312, "as A100, which it differs from in links"),
    ("A30", 165, "NVIDIA A30 data sheet"),
    ("A40", 149.7, "NVIDIA A40 data sheet"),
    ("A10", 125, "NVIDIA A10 data sheet"),
    ("L40S", 362, "NVIDIA L40S data sheet: 733 with sparsity"),
    ("L40", 181, "NVIDIA L40 data sheet"),
    ("L4", 121, "NVIDIA L4 data sheet: 242 with sparsity"),
    ("V100", 125, "NVIDIA V100 data sheet, SXM2; fp16 only"),
    ("T4", 65, "NVIDIA T4 data sheet; fp16 only"),
    ("MI355X", 2516, "AMD Instinct MI355X data sheet"),
    ("MI325X", 1307, "AMD Instinct MI325X data sheet"),
    ("MI300X", 1307, "AMD Instinct MI300X data sheet"),
    ("MI250X", 191.5, "AMD Instinct MI250X data sheet: 383 for its two dies, which torch counts as two devices"),
)
"""Words of a device's name, TFLOP/s, and where the number is from."""


def peak_flops(device_name: str) -> float | None:
    """Floating-point operations a second of a device at most, by the name that torch gives it; None if unknown."""
    words = set(re.split(r"[\s\-_/]+", device_name.lower()))
    for name, tera, _ in _PEAKS:
        if words.issuperset(name.lower().split()):
            return tera * _TERA
    return None


def own_peak_flops() -> float | None:
    """Those of this rank's device; None where it is not in the table, or no World is open."""
    world = World.current()
    if world is None or world.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(world.device))
