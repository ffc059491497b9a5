"""What travels between ranks: a header of integers that says what it is, and bytes.

Contract: `Collectives` encodes a value on each rank, exchanges the headers, which have one size, then the bytes, whose
sizes are known by then, and decodes. Tensors travel as their own bytes and numbers as 64 bits in the header, so nothing
is rounded. A value that cannot travel becomes a payload too: it tells every rank why, so that all raise the same error.
"""

from __future__ import annotations

import numbers
import pickle
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from allstep.parallel.dtensor import is_dtensor

_MAX_DIMS = 16  # headers have one length, so dimensions have a limit
HEADER_LENGTH = 5 + _MAX_DIMS

# Indices into this table travel; it is the same on all ranks of one torch version.
_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


class PayloadKind(IntEnum):
    """What a payload holds."""

    TENSOR = 0
    BOOL = 1
    INT = 2
    FLOAT = 3
    OBJECT = 4
    REFUSED = 5


@dataclass(frozen=True, slots=True)
class Payload:
    """One rank's value in transit.

    `value` holds a number's 64 bits or a tensor's dtype, `data` the bytes (uint8) of a tensor, an object or a refusal.
    """

    kind: PayloadKind
    value: int
    shape: tuple[int, ...]
    data: torch.Tensor

    def header(self) -> list[int]:
        """`HEADER_LENGTH` integers of 64 bits."""
        shape = [*self.shape, *[0] * (_MAX_DIMS - len(self.shape))]
        return [self.kind, self.value, self.data.numel(), self.data.device.type != "cpu", len(self.shape), *shape]


def data_size(header: Sequence[int]) -> int:
    """Bytes of data that a header announces."""
    return header[2]


def is_on_device(header: Sequence[int]) -> bool:
    """Whether the data that a header announces lies on an accelerator."""
    return bool(header[3])


def from_header(header: Sequence[int], data: torch.Tensor) -> Payload:
    """The payload that a header and its bytes (uint8, possibly padded) make."""
    kind, value, size, _, dims = header[:5]
    return Payload(PayloadKind(kind), value, tuple(header[5 : 5 + dims]), data[:size])


def encode(value: object) -> Payload:
    """A tensor or a number, ready to travel; anything else as a refusal."""
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value)
    # Before integers, since a bool is one.
    if isinstance(value, bool):
        return _number(PayloadKind.BOOL, int(value))
    if isinstance(value, numbers.Integral):
        integer = int(value)
        if not -(2**63) <= integer < 2**63:
            return refuse(f"{integer}, which does not fit into 64 bits; use gather_objects")
        return _number(PayloadKind.INT, integer)
    if isinstance(value, numbers.Real):
        return _number(PayloadKind.FLOAT, struct.unpack("<q", struct.pack("<d", float(value)))[0])
    return refuse(f"a {type(value).__name__}; use gather_objects for anything but tensors and numbers")


def encode_object(value: object) -> Payload:
    """Any object that can be pickled."""
    try:
        return Payload(PayloadKind.OBJECT, 0, (), _to_bytes(pickle.dumps(value)))
    except Exception as error:
        return refuse(f"a {type(value).__name__} that cannot be pickled: {error}")


def refuse(reason: str) -> Payload:
    """A payload that says why there is no value."""
    return Payload(PayloadKind.REFUSED, 0, (), _to_bytes(reason.encode()))


def decode(payload: Payload, device: torch.device) -> object:
    """The value of a payload; a tensor is put on `device`."""
    if payload.kind is PayloadKind.TENSOR:
        dtype = _DTYPES[payload.value]
        return payload.data.view(dtype).reshape(payload.shape).to(device)
    if payload.kind is PayloadKind.OBJECT:
        return pickle.loads(payload.data.cpu().numpy().tobytes())
    if payload.kind is PayloadKind.FLOAT:
        return struct.unpack("<d", struct.pack("<q", payload.value))[0]
    return bool(payload.value) if payload.kind is PayloadKind.BOOL else payload.value


def refusal(payload: Payload) -> str:
    """Why a refused payload has no value."""
    return payload.data.cpu().numpy().tobytes().decode()


def lack_of(tensor: torch.Tensor) -> str | None:
    """What a tensor lacks to be sent or reduced, and what to do; None where it lacks nothing."""
    if is_dtensor(tensor):
        return (
            f"a DTensor of shape {tuple(tensor.shape)}, of which each rank holds a part; give x.full_tensor(), the "
            "whole, which all ranks call together, or x.to_local(), this rank's part"
        )
    return None


def _encode_tensor(tensor: torch.Tensor) -> Payload:
    if lack := lack_of(tensor):
        return refuse(lack)
    if tensor.dim() > _MAX_DIMS:
        return refuse(f"a tensor of {tensor.dim()} dimensions; at most {_MAX_DIMS} travel, so reshape it")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return refuse(f"a tensor of layout {tensor.layout} and dtype {tensor.dtype}; make it dense and not quantized")
    # Conjugate and negative views are lazy; their bytes alone would read as another tensor.
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    # A copy in any case, so that what is received never shares memory with what was given.
    data = flat.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return Payload(PayloadKind.TENSOR, _DTYPES.index(tensor.dtype), tuple(tensor.shape), data)


def _number(kind: PayloadKind, bits: int) -> Payload:
    return Payload(kind, bits, (), torch.empty(0, dtype=torch.uint8))


def _to_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
