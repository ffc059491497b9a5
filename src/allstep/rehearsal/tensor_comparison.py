"""Two checkpoints compared, tensor by tensor and bit by bit.

Contract: `compare_checkpoints` reads both and changes nothing. Tensors are told by their names in the checkpoints, such
as `model/0.weight` and `optimizer/state/0/exp_avg`. They are the same where shape, dtype and every bit are. What a rank
has for itself, such as its random generators, is not compared: it ends with the run. `newest` finds what to compare.

What can go wrong: a checkpoint that cannot be read is a CheckpointError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from allstep.checkpoint.catalog import Entry, entries
from allstep.checkpoint.encoding import StateFile
from allstep.checkpoint.manifest import STATE
from allstep.checkpoint.reading import CheckpointReader
from allstep.checkpoint.safetensors_file import find_dtype
from allstep.checkpoint.storage import open_storage
from allstep.rehearsal.rehearsal_report import Comparison, TensorDifference


def newest(folder: Path) -> dict[str, Entry]:
    """The newest whole checkpoint of each place that a run saved to, by the place's folder."""
    found = {}
    for place in sorted((folder / "checkpoints").glob("*")):
        whole = [each for each in entries(str(place)) if each.state == "whole"]
        if whole:
            found[place.name] = whole[-1]
    return found


def compare_runs(unbroken: Path, other: Path) -> Comparison | None:
    """Compare the last checkpoints of two runs of a rehearsal; None where one of them has none."""
    ours, theirs = newest(unbroken), newest(other)
    if not ours or not theirs:
        return None
    total = Comparison()
    several = len(ours.keys() | theirs.keys()) > 1
    for place in sorted(ours.keys() | theirs.keys()):
        if place not in ours or place not in theirs:
            there = "the interrupted run" if place in theirs else "the unbroken run"
            total.differences.append(TensorDifference(place, f"only {there} saved there"))
            continue
        found = compare_checkpoints(ours[place], theirs[place])
        total.add(found, prefix=f"{place}: " if several else "")
    return total


def compare_checkpoints(unbroken: Entry, other: Entry) -> Comparison:
    """Compare two checkpoints."""
    with _reader(unbroken) as ours, _reader(other) as theirs:
        mine, others = ours.state_file(STATE), theirs.state_file(STATE)
        found = Comparison(
            steps=(_step(unbroken), _step(other)), objects=_objects(mine), other_objects=_objects(others)
        )
        for name in sorted(mine.tensors.keys() | others.tensors.keys()):
            if name not in mine.tensors or name not in others.tensors:
                where = "interrupted" if name in others.tensors else "unbroken"
                found.differences.append(TensorDifference(name, f"only in the {where} run"))
                continue
            found.tensors += 1
            record, other_record = mine.tensors[name], others.tensors[name]
            found.numbers += math.prod(record.shape)
            if (record.dtype, record.shape) != (other_record.dtype, other_record.shape):
                kinds = [f"{find_dtype(each.dtype)} {list(each.shape)}" for each in (record, other_record)]
                found.differences.append(TensorDifference(name, f"{kinds[0]} and {kinds[1]}"))
                continue
            one, two = ours.read_tensor(name, record), theirs.read_tensor(name, other_record)
            if not same_bits(one, two):
                largest, relative = distance(one, two)
                found.differences.append(TensorDifference(name, "values", largest, relative))
    return found


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape have the same bits, those of NaN included."""
    return bool(torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, two))))


def distance(one: torch.Tensor, two: torch.Tensor) -> tuple[float, float]:
    """The largest difference between two tensors, and the same as a part of the largest number in the first.

    Infinity where one of them has a NaN or an infinity that the other has not.
    """
    kind = torch.complex128 if one.is_complex() else torch.float64
    one, two = one.to(kind), two.to(kind)
    both = torch.isfinite(one) & torch.isfinite(two)
    if bool((~both).any()) and not same_bits(one[~both], two[~both]):
        return math.inf, math.inf
    largest = float((one[both] - two[both]).abs().max()) if bool(both.any()) else 0.0
    scale = float(one[both].abs().max()) if bool(both.any()) else 0.0
    return largest, largest / scale if scale else (math.inf if largest else 0.0)


def _reader(entry: Entry) -> CheckpointReader:
    assert entry.manifest is not None  # of a whole one
    return CheckpointReader(open_storage(entry.folder), entry.name, entry.manifest)


def _step(entry: Entry) -> int:
    assert entry.manifest is not None
    return entry.manifest.step


def _objects(state: StateFile) -> tuple[str, ...]:
    return tuple(state.value) if isinstance(state.value, Mapping) else ()
