"""The safetensors format: a header of JSON, then the bytes of the tensors without a gap.

Contract: `lay_out` decides where each tensor goes in a file before any is at hand. So a save can copy tensors straight
to where they will be written, and hash them on the way, while the safetensors library serialises a whole file at once.
`read_header` trusts nothing: every offset is checked against dtype, shape and the size of the file before a byte of
data is read. It raises DamagedCheckpointError.

A tensor is stored bit for bit under a dtype that the format has. Complex tensors are stored as pairs of reals, with one
more dimension of length 2. Other dtypes of one byte, such as the rarer kinds of float8, are stored as bytes. The
checkpoint's JSON keeps the true dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

import torch

from allstep.errors import DamagedCheckpointError

_LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
MOST_DIMENSIONS = 64  # of a tensor, torch's own limit
LARGEST_COUNT = 2**63 - 1  # of elements or bytes: torch counts in 64 bits
NOTES = "__metadata__"
"""What the format keeps notes under; no tensor can have this name."""

_FORMAT = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_FROM_FORMAT = {name: dtype for dtype, name in _FORMAT.items()}
_AS_REAL = {torch.complex128: torch.float64, torch.complex64: torch.float32, torch.complex32: torch.float16}
_NAMES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without "torch.", as the checkpoint's JSON has it."""
    return str(dtype).removeprefix("torch.")


def find_dtype(name: str) -> torch.dtype:
    """The dtype of a name. Raises KeyError."""
    return _NAMES[name]


def is_storable(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype can be stored."""
    other_byte = dtype.itemsize == 1 and dtype.is_floating_point
    return dtype in _FORMAT or dtype in _AS_REAL or other_byte


def stored_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a file has for a tensor of this one."""
    return _AS_REAL.get(dtype, dtype if dtype in _FORMAT else torch.uint8)


def stored_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a file has for a tensor of this dtype and shape."""
    return (*shape, 2) if dtype in _AS_REAL else shape


def to_stored(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a tensor's values in the stored dtype and shape (a copy where signs or conjugation are pending)."""
    # Conjugation and negation are flags on a lazy view; the bytes below it are those of the original.
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype in _AS_REAL:
        return torch.view_as_real(tensor)
    stored = stored_as(tensor.dtype)
    return tensor if stored is tensor.dtype else tensor.view(stored)


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """A tensor's place in the bytes that follow the header."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.begin + math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file to be: its header, and a slot for each tensor, in the file's order."""

    header: bytes
    slots: tuple[TensorSlot, ...]

    @property
    def data_size(self) -> int:
        """Bytes that follow the header."""
        return self.slots[-1].end if self.slots else 0


def lay_out(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> FileLayout:
    """Place tensors of the given keys, stored dtypes and shapes; wide dtypes come first, so that all are aligned."""
    # The key breaks ties, so that a file's layout does not depend on the order in which tensors come.
    ordered = sorted(tensors, key=lambda entry: (-entry[1].itemsize, entry[0]))
    slots: list[TensorSlot] = []
    for key, dtype, shape in ordered:
        slots.append(TensorSlot(key, dtype, shape, slots[-1].end if slots else 0))
    described: dict[str, object] = {NOTES: metadata} if metadata else {}
    for slot in slots:
        described[slot.key] = {
            "dtype": _FORMAT[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [slot.begin, slot.end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    # The header is filled up to a multiple of 8, as the library does, so that the data behind it is aligned.
    text += b" " * (-len(text) % 8)
    return FileLayout(len(text).to_bytes(8, "little") + text, tuple(slots))


def read_header(file: BinaryIO, size: int) -> tuple[int, dict[str, TensorSlot]]:
    """Where the tensors' bytes begin in a file of `size` bytes, and the slot of each key.

    Raises:
        DamagedCheckpointError: it is no safetensors file, or one that promises more than it has.
    """
    try:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_LARGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        described = json.loads(file.read(length))
        described.pop(NOTES, None)
        slots = {key: _read_slot(key, entry, size - 8 - length) for key, entry in described.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"not a safetensors file: {type(error).__name__}: {error}") from error
    return 8 + length, slots


def _read_slot(key: str, entry: dict[str, object], data_size: int) -> TensorSlot:
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"tensor {key!r} is not described by lists")
    # Before anything is multiplied: the product of a hundred thousand long numbers takes minutes.
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"tensor {key!r} has {len(shape)} dimensions, more than the {MOST_DIMENSIONS} of any tensor")
    # Exact ints: True and 2.0 would pass a comparison and give a wrong shape.
    if any(type(number) is not int or not 0 <= number <= LARGEST_COUNT for number in [*shape, *offsets]):
        raise ValueError(f"tensor {key!r} has a shape or offsets that are no counts")
    slot = TensorSlot(key, _FROM_FORMAT[str(entry["dtype"])], tuple(shape), offsets[0])
    if slot.end != offsets[1] or slot.end > data_size:
        raise ValueError(f"tensor {key!r} lies at {offsets} of {data_size} bytes, which its shape {shape} does not fit")
    return slot
