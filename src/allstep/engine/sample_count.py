"""How many samples a batch has, whatever it is made of.

Contract: `count_samples` is asked for each batch whose weight matters, before the step sees the batch. It is pure. It
returns what the batch itself shows. Where the batch can be read in more than one way, what the sampler declared decides
between those ways, and nothing else: a declared number that fits none of them is not used. Where neither tells, it
raises, since a number that is guessed would become a wrong weight that nobody sees.

How a batch is read:

- A tensor, an array or a table has a sample in each row. A `PackedSequence` has as many as it has sequences.
- An object with a `batch_size` has that many.
- A mapping, a tuple, a named tuple or a dataclass has fields. The first tensor among them tells; where there is none,
  the first list. A field without rows tells nothing when another has some.
- A list has samples: texts, numbers, mappings, pairs, tensors of different shapes. What torch's `default_collate` made
  has fields instead, also in a list, and so has a list of things that do not look alike.
- Any other object has `len()` samples, or its attributes are fields.
- A number or a text is one sample.

Tensors of one shape in a list are the hard case: `[image, image]` is two samples, `[x, y]` may be two fields. Fields
beside it or what the sampler declared decide. Without either, tensors that look like images, with 1, 3 or 4 channels,
are samples, and all else is an error.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from allstep.errors import DataError

Declared = Callable[[], int | None]
"""Asked only where it matters: how many samples the batch has by its sampler's arithmetic; None where nobody says."""

_CHANNELS = (1, 3, 4)
_TEXTS = (str, bytes)
_SCALARS = (*_TEXTS, Number)


@dataclass(frozen=True, slots=True)
class Reading:
    """How many samples one part of a batch shows.

    Attributes:
        count: what its form says; None where its form has several meanings and no likeliest one.
        others: what else its form may mean.
        columns: the size of a tensor's second dimension, in which the samples lie where time comes first.
        is_plain: whether it is a list of texts or numbers, which tensors overrule: it may be no part of the samples.
    """

    count: int | None
    others: frozenset[int] = frozenset()
    columns: int | None = None
    is_plain: bool = False

    def allows(self, count: int, *, columns: bool = False) -> bool:
        """Whether the form may mean `count`; with `columns` also by the second dimension."""
        return count == self.count or count in self.others or (columns and count == self.columns)


def undeclared() -> int | None:
    """The `Declared` of data without a sampler that knows."""
    return None


def count_samples(batch: Any, declared: Declared = undeclared, *, default_collated: bool = False) -> int:
    """Samples in a batch; see the module for how it is read.

    Args:
        batch: of any structure.
        declared: how many its sampler dealt.
        default_collated: whether torch's `default_collate` made it.

    Raises:
        DataError: nothing tells.
    """
    # The first of what is read below, and most batches end here: this is asked for each of them.
    rows = _rows_of_first(batch, default_collated=default_collated)
    if rows and (default_collated or declared is undeclared or declared() == rows):
        return rows
    found = _readings(batch, default_collated=default_collated, is_top=True)
    if not found:
        dealt = declared()
        if dealt is not None:
            return dealt
        if _has_only_scalars(batch):
            return 1
        raise DataError(_cannot_tell(batch, "it shows none"))
    if any(not each.is_plain for each in found):
        found = [each for each in found if not each.is_plain]
    shown = _shown_by(found)
    if default_collated and shown is not None:
        return shown
    # One field with a dimension only, or a list of samples: there is no second way to read it.
    if shown is not None and all(each.count == shown and not each.others and each.columns is None for each in found):
        return shown
    return _decide(batch, found, shown, declared())


def _rows_of_first(batch: Any, *, default_collated: bool) -> int:
    """Rows of the tensor that a batch is or begins with; 0 where it begins with something else."""
    kind, first = type(batch), batch
    if kind is dict:
        first = next(iter(batch.values()), None)
    elif kind is tuple or (kind is list and default_collated):
        first = batch[0] if batch else None
    return first.size(0) if isinstance(first, torch.Tensor) and first.dim() else 0


def _shown_by(found: Sequence[Reading]) -> int | None:
    """What the parts show together, without anything declared."""
    told = [each.count for each in found if each.count is not None]
    if told:
        return next((count for count in told if count), 0)
    # Each part has several meanings: one that all of them share is meant.
    shared = frozenset.intersection(*(each.others for each in found))
    return next(iter(shared)) if len(shared) == 1 else None


def _decide(batch: Any, found: Sequence[Reading], shown: int | None, dealt: int | None) -> int:
    """Between what a batch shows and what its sampler dealt."""
    if dealt is None or dealt == shown:
        if shown is None:
            raise DataError(_cannot_tell(batch, _alternatives(found)))
        return shown
    if all(each.allows(dealt) for each in found):
        return dealt
    if all(each.allows(dealt, columns=True) for each in found):
        if shown is not None and all(each.allows(shown) for each in found):
            raise DataError(
                _cannot_tell(batch, f"its first dimension says {shown}, its sampler and its second dimension {dealt}")
            )
        return dealt
    votes = Counter(each.count for each in found)
    if votes[dealt] and votes[dealt] >= votes[shown]:
        return dealt
    if shown is None:
        raise DataError(_cannot_tell(batch, f"{_alternatives(found)}, and its sampler dealt {dealt}"))
    return shown


def _readings(value: Any, *, default_collated: bool, is_top: bool = False) -> list[Reading]:
    """What each part of a value shows, depth first; nothing for numbers, texts and what is not understood."""
    if isinstance(value, torch.Tensor):
        return _readings_of_tensor(value)
    if _is_scalar(value):
        return []
    if isinstance(value, PackedSequence):
        return [Reading(int(value.batch_sizes[0]))]
    size = getattr(value, "batch_size", None)
    if isinstance(size, Sequence) and len(size):  # that of a TensorDict is a shape
        size = size[0]
    if isinstance(size, int) and not isinstance(size, bool):
        return [Reading(size)]
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return [Reading(int(shape[0]), columns=int(shape[1]) if len(shape) > 1 else None)] if shape else []
    if isinstance(value, Mapping):
        return _of_fields(value.values(), default_collated)
    if dataclasses.is_dataclass(value):
        return _of_fields(vars(value).values() if hasattr(value, "__dict__") else _slots(value), default_collated)
    if hasattr(value, "_fields") and isinstance(value, tuple):
        return _of_fields(value, default_collated)
    if isinstance(value, Sequence):
        return _readings_of_sequence(value, default_collated=default_collated, is_top=is_top)
    if hasattr(value, "__len__"):
        return [Reading(len(value))]
    return _of_fields(vars(value).values(), default_collated) if hasattr(value, "__dict__") else []


def _of_fields(fields: Iterable[Any], default_collated: bool) -> list[Reading]:
    return [each for field in fields for each in _readings(field, default_collated=default_collated)]


def _readings_of_tensor(tensor: torch.Tensor) -> list[Reading]:
    dimensions = tensor.dim()
    if not dimensions:
        return []
    # A nested tensor has no shape, but a size in its first dimension.
    is_table = dimensions > 1 and not tensor.is_nested
    return [Reading(tensor.size(0), columns=tensor.size(1) if is_table else None)]


def _readings_of_sequence(parts: Sequence[Any], *, default_collated: bool, is_top: bool) -> list[Reading]:
    """What a list or tuple shows; inside of a field both are a column with a part for each sample."""
    count = len(parts)
    if not count:
        return [Reading(0)]
    if all(map(_is_scalar, parts)):
        return [Reading(count, is_plain=True)] if len(set(map(_kind, parts))) == 1 else []
    if default_collated:
        return _of_fields(parts, default_collated)
    if all(isinstance(part, Sequence) and not isinstance(part, _TEXTS) for part in parts):
        return _readings_of_rows(parts, is_top=is_top)
    if len(set(map(_kind, parts))) > 1:
        return _of_fields(parts, default_collated)
    if isinstance(parts[0], Mapping):
        return [Reading(count, others=_common([_of_fields(part.values(), False) for part in parts], parts))]
    if _first_size(parts[0]) is not None:
        return _readings_of_tensors(parts, is_record=is_top and isinstance(parts, tuple))
    # Batches of a library beside each other, such as two of graphs, are fields.
    if getattr(parts[0], "batch_size", None) is not None:
        return _of_fields(parts, default_collated)
    return [Reading(count)]


def _readings_of_tensors(parts: Sequence[Any], *, is_record: bool) -> list[Reading]:
    """Of tensors that look alike: samples, or the fields of a record such as `(x, y)`."""
    count, sizes = len(parts), {_first_size(part) for part in parts}
    first = _first_size(parts[0])
    assert first is not None
    widths = {part.shape[1] if len(part.shape) > 1 else None for part in parts}
    columns = widths.pop() if len(widths) == 1 else None
    if is_record:
        return [Reading(_first_size(part), frozenset({count}), columns) for part in parts]
    if len(sizes) > 1:
        return [Reading(count, columns=columns)]
    looks_like_image = len(parts[0].shape) == 3 and first in _CHANNELS
    return [Reading(count if looks_like_image else None, frozenset({count, first}), columns)]


def _readings_of_rows(rows: Sequence[Sequence[Any]], *, is_top: bool) -> list[Reading]:
    """Of sequences in a sequence: each one a sample, or each one a column with a part for every sample."""
    count, lengths = len(rows), {len(row) for row in rows}
    has_columns = all(len(set(map(_kind, row))) == 1 for row in rows)
    are_alike = len({tuple(map(_kind, row)) for row in rows}) == 1
    is_record = is_top and isinstance(rows, tuple)
    as_fields = [_readings(row, default_collated=False) for row in rows]
    if has_columns:
        if len(lengths) > 1:
            return [Reading(count)]
        if not are_alike:
            return [each for row in as_fields for each in row]
        length = lengths.pop()
        return [Reading(length if is_record else count, frozenset({count, length}))]
    if are_alike:
        if is_record and all(_common([row], [parts]) for row, parts in zip(as_fields, rows, strict=True)):
            return [Reading(row[0].count, frozenset({count})) for row in as_fields]
        return [Reading(count, _common(as_fields, rows))]
    return [each for row in as_fields for each in row]


def _common(of_parts: Sequence[Sequence[Reading]], parts: Sequence[Any]) -> frozenset[int]:
    """The number of samples that parts of a list show, if each of them can be a batch's field and all show the same.

    A mapping or a pair with a number or a text in it is a sample: fields of a batch have rows.
    """
    values = [list(part.values()) if isinstance(part, Mapping) else list(part) for part in parts]
    if any(_is_scalar(value) for row in values for value in row):
        return frozenset()
    shown = {each.count for readings in of_parts for each in readings}
    return frozenset(shown) if len(shown) == 1 and None not in shown else frozenset()  # type: ignore[arg-type]


def _is_scalar(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0
    if value is None or isinstance(value, _SCALARS):
        return True
    return getattr(value, "shape", None) == ()


def _has_only_scalars(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        return all(map(_has_only_scalars, batch.values()))
    if isinstance(batch, Sequence) and not isinstance(batch, _TEXTS):
        return all(map(_has_only_scalars, batch))
    return _is_scalar(batch)


def _kind(value: Any) -> Any:
    """What parts of a list have in common when they look alike."""
    if isinstance(value, Mapping):
        return frozenset(map(str, value))
    size = _first_size(value)
    if size is not None:
        return type(value), len(value.shape), value.dtype
    if isinstance(value, Sequence) and not isinstance(value, _TEXTS):
        return Sequence
    return Number if isinstance(value, Number) else type(value)


def _first_size(value: Any) -> int | None:
    """Rows of a tensor or an array with any dimension; None for all else."""
    if isinstance(value, torch.Tensor):
        return value.size(0) if value.dim() and not value.is_nested else None
    shape = getattr(value, "shape", None)
    return int(shape[0]) if isinstance(shape, tuple) and shape and hasattr(value, "dtype") else None


def _slots(value: Any) -> list[Any]:
    return [getattr(value, field.name) for field in dataclasses.fields(value) if hasattr(value, field.name)]


def _alternatives(found: Sequence[Reading]) -> str:
    counts = sorted({count for each in found for count in ({each.count} | each.others) if count is not None})
    return f"its form may mean {' or '.join(map(str, counts))}"


def _cannot_tell(batch: Any, why: str) -> str:
    return (
        f"cannot tell how many samples a batch has: {_in_words(batch)}; {why}. Say it with "
        "Engine(step, samples_in=function), where function(batch) returns their number, such as samples_in=len"
    )


def _in_words(value: Any) -> str:
    """A batch's form in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} of {len(value)}, the first of them {_in_words(value[0])}"
    return f"a {type(value).__name__}"
