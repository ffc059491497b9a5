"""How tensors' dtypes are called in safetensors files.

Contract: a tensor is stored under a dtype that safetensors knows, bit for bit. Complex tensors are stored as pairs of
reals, with one more dimension of length 2; other dtypes of one byte that the format does not know, as bytes. The
checkpoint's own index keeps the true dtype.
"""

from __future__ import annotations

import torch

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
_AS_REAL = {torch.complex128: torch.float64, torch.complex64: torch.float32, torch.complex32: torch.float16}
_NAMES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without torch's."""
    return str(dtype).removeprefix("torch.")


def find_dtype(name: str) -> torch.dtype:
    """The dtype of a name. Raises KeyError."""
    return _NAMES[name]


def is_storable(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype can be stored."""
    exotic = dtype.itemsize == 1 and dtype.is_floating_point
    return dtype in _FORMAT or dtype in _AS_REAL or exotic


def stored_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a file has for a tensor of this one."""
    return _AS_REAL.get(dtype, dtype if dtype in _FORMAT else torch.uint8)


def stored_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a file has for a tensor of this dtype and shape."""
    return (*shape, 2) if dtype in _AS_REAL else shape


def to_stored(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a tensor's values in the stored dtype and shape (a copy where signs or conjugation are pending)."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype in _AS_REAL:
        return torch.view_as_real(tensor)
    stored = stored_as(tensor.dtype)
    return tensor if stored is tensor.dtype else tensor.view(stored)


def format_name(dtype: torch.dtype) -> str:
    """What safetensors calls a stored dtype."""
    return _FORMAT[dtype]


FORMAT_DTYPES = {name: dtype for dtype, name in _FORMAT.items()}
