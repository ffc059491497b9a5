"""Outputs sample by sample: from what one step returned to all ranks' samples in one order, and to bytes and back.

Contract: pure functions, in the order in which a sample passes them. `named_outputs` copies a step's output to the
host, so that the step may use its memory again. A rank keeps what it has seen as `Samples`, in the order in which it
saw it: for each sample where it stands and, by name, a tensor or a text. `pack_samples` and `unpack_samples` are each
other's inverse, given equal names. `join_samples` joins those of all ranks, of which any may have none. Tensors of one
shape and type become one tensor with a row a sample; others, and texts, stay a list, which `flatten_column` turns into
two plain tensors and `restore_column` back. What can go wrong: the output lacks a name, or something in it has no value
a sample (ArgumentError).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard, cast

import numpy as np
import torch

from allstep.cuda import copied_ahead
from allstep.errors import ArgumentError
from allstep.metrics.packing import Packed, element_parts, read_elements
from allstep.world.xla_private import on_each_device

# One batch of an output: a tensor with a row a sample, or a list with a tensor, or a text, a sample.
BatchOutput: TypeAlias = torch.Tensor | list[torch.Tensor] | list[str]

# All samples of an output, in the same three ways.
Column: TypeAlias = torch.Tensor | list[torch.Tensor] | list[str]

_ROWS, _RAGGED, _TEXTS = range(3)  # how a column travels

POSITION_SIZE = 2  # integers that say where a sample stands: its index in the dataset, where known, and the iteration


@dataclass(frozen=True, slots=True)
class Samples:
    """Some samples: `positions` int64 (n, 2), and for each name n samples."""

    positions: torch.Tensor
    columns: Mapping[str, Column]


NO_SAMPLES = Samples(torch.zeros((0, POSITION_SIZE), dtype=torch.int64), {})


# A step's output, copied to the host


def named_outputs(output: Any, names: Sequence[str]) -> dict[str, BatchOutput]:
    """The values of each name in one step's output: a mapping's by key, a tuple's in order, or the output itself.

    Raises:
        ArgumentError: a name is missing, numbers of samples differ, or an output has no value a sample.
    """
    if isinstance(output, Mapping):
        missing = [name for name in names if name not in output]
        if missing:
            raise ArgumentError(
                f"the output has {', '.join(map(str, output)) or 'no key'} and lacks {', '.join(missing)}"
            )
        named = {name: output[name] for name in names}
    else:
        values = output if isinstance(output, tuple) else (output,)
        if len(values) != len(names):
            raise ArgumentError(f"the output has {len(values)} elements for the names {', '.join(names)}")
        named = dict(zip(names, values, strict=True))
    found = {name: _on_host(name, value) for name, value in named.items()}
    lengths = {name: len(value) for name, value in found.items()}
    if len(set(lengths.values())) > 1:
        raise ArgumentError(f"outputs have different numbers of samples: {lengths}")
    return found


def _on_host(name: str, value: Any) -> BatchOutput:
    if isinstance(value, np.ndarray):
        value = value.tolist() if value.dtype.kind == "U" and value.ndim == 1 else torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        if value.ndim == 0:
            raise ArgumentError(f"output {name!r} is one number; give a tensor with a value a sample")
        return _copied(value)
    if isinstance(value, Mapping):
        raise ArgumentError(_in_words(name, value))
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ArgumentError(
            f"output {name!r} is a {type(value).__name__}; give a tensor, or a list with a tensor or a text a sample"
        )
    if all(isinstance(each, str) for each in value):  # names and ids of samples
        return [str(each) for each in value]
    return [_sample(name, each) for each in value]


def _sample(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, Mapping):
        raise ArgumentError(_in_words(f"{name}[0]", value))
    try:
        return _copied(torch.as_tensor(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"output {name!r} has a {type(value).__name__} for a sample: {error}") from error


def _in_words(name: str, value: Mapping[Any, Any]) -> str:
    keys = ", ".join(map(str, value))
    return f"output {name!r} is a mapping of {keys}; have the step return each of these under a name of its own"


def _copied(value: torch.Tensor) -> torch.Tensor:
    # A tensor on the host may be the step's own buffer, which the next step overwrites.
    if value.device.type == "cpu":
        return value.detach().clone()
    return copied_ahead(value.detach()) if value.is_cuda else on_each_device(value.detach()).cpu()


# All samples in one order


def column_of(batches: Sequence[Any]) -> Column:
    """One column of what each batch had: a tensor with a row a sample, or a list of tensors."""
    # One tensor where that can be, instead of an object for each sample.
    tensors = [batch for batch in batches if isinstance(batch, torch.Tensor)]
    if len(tensors) == len(batches) and len({(t.dtype, t.shape[1:]) for t in tensors}) == 1:
        return torch.cat(tensors)
    return [sample for batch in batches for sample in (batch.unbind() if isinstance(batch, torch.Tensor) else batch)]


def join_samples(parts: Sequence[Samples], names: Sequence[str], *, have_indices: bool) -> dict[str, Column]:
    """All samples in order.

    Args:
        parts: of each rank, in rank order.
        names: of the columns.
        have_indices: whether all indices are known: then samples are in their order, and "index" has them; else they
            are in order of iteration, then rank.
    """
    positions = torch.cat([part.positions for part in parts])
    # Stable, so that samples of one iteration stay in rank order where no index is known.
    order = torch.sort(positions[:, 0 if have_indices else 1], stable=True).indices
    found = {
        name: _ordered(column_of([part.columns[name] for part in parts if len(part.positions)]), order)
        for name in names
    }
    if have_indices:
        found["index"] = positions[order, 0]
    return found


def _ordered(column: Column, order: torch.Tensor) -> Column:
    if isinstance(column, torch.Tensor):
        return column[order]
    return [column[at] for at in order.tolist()]


def flatten_column(name: str, column: Column) -> dict[str, torch.Tensor]:
    """A column as plain tensors, by a kind and the name.

    These are "rows"; or all "values" in one row and each sample's "shapes"; or, of texts, the "characters" as UTF-8 and
    each sample's "lengths" in bytes. No two names have a tensor of the same key.

    Raises:
        ArgumentError: samples differ in type or number of dimensions.
    """
    if isinstance(column, torch.Tensor):
        return {f"rows.{name}": column}
    if _are_texts(column):
        characters, lengths = _as_tensors(column)
        return {f"characters.{name}": characters, f"lengths.{name}": lengths}
    samples = cast(list[torch.Tensor], column)
    if len({(sample.dtype, sample.ndim) for sample in samples}) > 1:
        raise ArgumentError(
            f"samples of {name!r} differ in type or number of dimensions; they cannot be written to a file"
        )
    dimensions = samples[0].ndim if samples else 0
    shapes = torch.tensor([list(sample.shape) for sample in samples], dtype=torch.int64).reshape(
        len(samples), dimensions
    )
    values = torch.cat([sample.reshape(-1) for sample in samples]) if samples else torch.empty(0)
    return {f"values.{name}": values, f"shapes.{name}": shapes}


def restore_column(name: str, tensors: Mapping[str, torch.Tensor]) -> Column:
    """The column that `flatten_column` gave."""
    if f"rows.{name}" in tensors:
        return tensors[f"rows.{name}"]
    if f"lengths.{name}" in tensors:
        return _as_texts(tensors[f"characters.{name}"], tensors[f"lengths.{name}"])
    shapes = [torch.Size(shape) for shape in tensors[f"shapes.{name}"].tolist()]
    rows = torch.split(tensors[f"values.{name}"], [shape.numel() for shape in shapes]) if shapes else ()
    return [row.reshape(shape) for row, shape in zip(rows, shapes, strict=True)]


def _are_texts(column: Sequence[Any]) -> TypeGuard[Sequence[str]]:
    return bool(column) and all(isinstance(sample, str) for sample in column)


def _as_tensors(texts: Sequence[str]) -> list[torch.Tensor]:
    """Texts as their bytes in UTF-8, uint8, and how many each has, int64."""
    # What came from a file system may hold bytes that are no text; they come back as they were.
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    return [
        torch.from_numpy(np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()),
        torch.tensor([len(each) for each in encoded], dtype=torch.int64),
    ]


def _as_texts(characters: torch.Tensor, lengths: torch.Tensor) -> list[str]:
    data, ends = characters.numpy().tobytes(), lengths.cumsum(0).tolist()
    begins = [0, *ends[:-1]]
    return [data[begin:end].decode("utf-8", "surrogatepass") for begin, end in zip(begins, ends, strict=True)]


# As bytes


def pack_samples(samples: Samples, names: Sequence[str]) -> Packed:
    """One rank's samples in transit."""
    manifest: list[int] = []
    parts = element_parts([samples.positions], manifest)
    for name in names:
        column = samples.columns[name]
        elements: Sequence[torch.Tensor]
        if isinstance(column, torch.Tensor):
            form, elements = _ROWS, [column]
        elif _are_texts(column):
            form, elements = _TEXTS, _as_tensors(column)
        else:
            form, elements = _RAGGED, cast(list[torch.Tensor], column)
        manifest += [form, len(elements)]
        parts += element_parts(elements, manifest)
    return Packed(manifest, parts)


def unpack_samples(manifest: Sequence[int], payload: torch.Tensor, names: Sequence[str]) -> Samples:
    """What another rank's `pack_samples` gave. Tensors are views of the payload."""
    numbers = iter(manifest)
    elements = read_elements(numbers, payload, 0)
    positions = next(elements)
    columns: dict[str, Column] = {}
    for name in names:
        form, count = next(numbers), next(numbers)
        found = [next(elements) for _ in range(count)]
        columns[name] = found[0] if form == _ROWS else _as_texts(*found) if form == _TEXTS else found
    return Samples(positions, columns)
