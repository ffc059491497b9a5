"""Nested state as JSON and named tensors, and the JSON files that hold it. Nothing in a checkpoint is ever executed.

Contract: `encode` takes what a `state_dict` is made of. It gives a JSON document in which tensors are named, and the
tensors by name. `decode` gives the same value back with the same types. JSON's own types stand for themselves;
everything else is an object with one key that begins with "$". A value that cannot be saved is refused with its key and
its type. Two keys with one tensor (tied weights) share a name. The name of a tensor is made of the keys that lead to it
and of nothing else. So all ranks find the same names, and so does a run that loads into tensors of its own.

`state.json` and each `rank_N.json` hold a `StateFile`: a document, and for each tensor that it names the dtype, the
shape and the pieces it is stored in. `read_state_file` takes bytes from anywhere. It gives a `StateFile` in which the
pieces of every tensor cover it exactly, or raises DamagedCheckpointError.
"""

from __future__ import annotations

import base64
import collections
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from allstep.checkpoint.manifest import FileName
from allstep.checkpoint.safetensors_file import LARGEST_COUNT, MOST_DIMENSIONS, dtype_name, find_dtype, is_storable
from allstep.checkpoint.sharding import Box, covers
from allstep.checkpoint.torch_private import module_versions, set_module_versions, wraps_tensors
from allstep.errors import AllstepError, DamagedCheckpointError, UnsupportedStateError
from allstep.parallel import is_dtensor

_DEEPEST = 100  # levels; far more than any state has, and far fewer than Python's recursion limit
_INLINE_ARRAY = 16 << 10  # bytes; a larger numpy array is stored as a tensor instead of as text
_NUMBER = re.compile(r"-?\d+")
_LARGEST_STATE_FILE = 256 << 20  # bytes of JSON; reading it takes some twenty times as much memory
_MOST_OF_ONE_HASH = 1000  # keys; those of numbers are known to whoever writes a file
_WITHOUT_ADDRESSES = ("xla",)  # types of devices
_ARRAY_KINDS = "biufcSUmM"  # numpy's kinds of plain elements: no objects, no records

Fetch = Callable[[str], torch.Tensor]


@dataclass(frozen=True, slots=True)
class FromRankZero:
    """Marks a tensor that differs by rank and of which rank 0's values are saved; it comes back as a tensor."""

    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Encoded:
    """A JSON document and the tensors that it names, with the names of those marked as `FromRankZero`."""

    document: Any
    tensors: dict[str, torch.Tensor]
    from_rank_zero: frozenset[str] = frozenset()


def encode(value: Any, prefix: str) -> Encoded:
    """Take a nested value apart.

    Args:
        value: of dicts, lists, tuples, numbers, strings, bytes, None, tensors, numpy arrays and scalars.
        prefix: what the tensors' names begin with, and the errors' keys.

    Raises:
        UnsupportedStateError: something else is in it.
    """
    encoder = _Encoder()
    return Encoded(encoder.encode(value, (prefix,)), encoder.tensors, frozenset(encoder.from_rank_zero))


def decode(document: Any, fetch: Fetch) -> Any:
    """Put a value together again; `fetch` reads the tensor of a name.

    Raises:
        DamagedCheckpointError: `encode` gives no such document.
    """
    try:
        return _decode(document, fetch)
    except AllstepError:
        raise  # from `fetch`
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise DamagedCheckpointError(f"the saved state cannot be read: {type(error).__name__}: {error}") from error


@dataclass(slots=True)
class _Encoder:
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    from_rank_zero: set[str] = field(default_factory=set)
    _seen: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        kind = type(value)
        # Exact types: a subclass, such as an IntEnum, would come back as another type than it was.
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._name_tensor(value, path)}
        if kind is FromRankZero:
            name = self._name_tensor(value.tensor, path)
            self.from_rank_zero.add(name)
            return {"$tensor": name}
        if isinstance(value, np.generic | np.ndarray):
            return self._encode_array(value, path)
        # Tensors and arrays are leaves. What follows is nested, and may hold itself.
        if len(path) > _DEEPEST:
            raise UnsupportedStateError(f"{path[0]} is nested more than {_DEEPEST} deep, or holds itself")
        if kind in _SEQUENCES:
            items = [self.encode(item, (*path, str(at))) for at, item in enumerate(_in_order(value))]
            return items if kind is list else {_SEQUENCES[kind]: items}
        if kind in _MAPPINGS:
            return self._encode_mapping(value, path)
        return _encode_leaf(value, path)

    def _encode_mapping(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        kind = type(value)
        items = [(key, self.encode(item, (*path, name_part(key)))) for key, item in value.items()]
        # A plain dict of texts is a JSON object, unless one of its keys would be taken for a tag.
        if kind is dict and all(type(key) is str and not key.startswith("$") for key, _ in items):
            return dict(items)
        pairs = [[self._encode_key(key, path), item] for key, item in items]
        versions = module_versions(value)
        if kind is collections.OrderedDict and versions is not None:
            return {"$ordered": pairs, "$versions": self.encode(versions, (*path, "_metadata"))}
        return {_MAPPINGS[kind]: pairs}

    def _encode_key(self, key: Any, path: tuple[str, ...]) -> Any:
        if isinstance(key, torch.Tensor | np.ndarray):
            raise UnsupportedStateError(f"{_key_path(path)} has a key of type {_type_name(key)}; use str or int keys")
        return self.encode(key, (*path, repr(key)))

    def _encode_array(self, value: np.generic | np.ndarray[Any, Any], path: tuple[str, ...]) -> Any:
        if value.dtype.kind not in _ARRAY_KINDS or value.dtype.names is not None:
            raise _unsupported(value, path, f"its elements are {value.dtype}; keep numbers")
        if not isinstance(value, np.generic) and type(value) not in (np.ndarray, np.memmap):
            raise _unsupported(value, path, "only its numbers would come back; give them as plain numpy arrays")
        array = np.asarray(value)
        # Large ones go into the tensors' file; copied, since torch takes no negative strides and no read-only arrays.
        if isinstance(value, np.ndarray) and array.nbytes > _INLINE_ARRAY and array.dtype.isnative:
            try:
                return {"$array": {"tensor": self._name_tensor(torch.from_numpy(array.copy(order="K")), path)}}
            except TypeError:
                pass  # torch has no such dtype: stored as text below, whatever its size
        content = {"dtype": array.dtype.str, "shape": list(array.shape)}
        content["data"] = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
        if not isinstance(value, np.ndarray):
            return {"$scalar": content}
        axes = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        # How numpy keeps an array whose first index runs fastest, and the like.
        if not array.flags.c_contiguous and array.transpose(axes).flags.c_contiguous:
            content["axes"] = axes
        return {"$array": content}

    def _name_tensor(self, tensor: torch.Tensor, path: tuple[str, ...]) -> str:
        _check_tensor(tensor, path)
        identity = _identity(tensor)
        if identity in self._seen:
            return self._seen[identity]
        name = tensor_name(path)
        self.tensors[name] = tensor
        if identity is not None:
            self._seen[identity] = name
        return name


_SEQUENCES: dict[type, str] = {list: "", tuple: "$tuple", torch.Size: "$size", set: "$set", frozenset: "$frozenset"}
_MAPPINGS: dict[type, str] = {
    dict: "$dict",
    collections.OrderedDict: "$ordered",
    collections.Counter: "$counter",
}
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _encode_leaf(value: Any, path: tuple[str, ...]) -> Any:
    if type(value) is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if type(value) is complex:
        return {"$complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, torch.dtype):
        return {"$dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    raise _unsupported(value, path, "give it as dicts, lists, tuples, numbers, strings, bytes, tensors or numpy arrays")


def _decode(node: Any, fetch: Fetch) -> Any:
    if isinstance(node, list):
        return [_decode(item, fetch) for item in node]
    if not isinstance(node, dict):
        return node
    # `encode` writes a tag first, and no object of its own begins with one.
    tag = next(iter(node), "")
    if not tag.startswith("$"):
        return {key: _decode(item, fetch) for key, item in node.items()}
    if tag == "$ordered":
        return _decode_ordered(node, fetch)
    if len(node) != 1 or tag not in _DECODERS:
        raise ValueError(f"an unknown kind of value, {sorted(node)[:3]}")
    return _DECODERS[tag](node[tag], fetch)


def _decode_ordered(node: dict[str, Any], fetch: Fetch) -> Any:
    ordered: Any = collections.OrderedDict(_spread(_pairs(node["$ordered"], fetch)))
    if "$versions" in node:
        set_module_versions(ordered, _decode(node["$versions"], fetch))
    return ordered


def _pairs(content: list[list[Any]], fetch: Fetch) -> list[tuple[Any, Any]]:
    return [(_decode(key, fetch), _decode(item, fetch)) for key, item in content]


def _spread(pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Keys with their values, unless so many keys have one hash that a dict of them would take for ever to make."""
    if len(pairs) > _MOST_OF_ONE_HASH:
        hashes = collections.Counter(hash(key) for key, _ in pairs)
        if max(hashes.values()) > _MOST_OF_ONE_HASH:
            raise ValueError("keys that were chosen for their hashes")
    return pairs


def _decode_size(content: list[int]) -> torch.Size:
    if any(type(number) is not int or abs(number) > LARGEST_COUNT for number in content):
        raise ValueError("a size of what are no counts")
    return torch.Size(content)


def _decode_array(content: dict[str, Any], fetch: Fetch) -> np.ndarray[Any, Any]:
    if "tensor" in content:
        return fetch(content["tensor"]).numpy()
    # The dtype is text from a file: "O" would read pointers to Python objects.
    dtype = np.dtype(content["dtype"])
    if dtype.kind not in _ARRAY_KINDS or dtype.names is not None:
        raise ValueError(f"an array of {dtype}")
    array = np.frombuffer(base64.b64decode(content["data"]), dtype).reshape(content["shape"])
    if "axes" not in content:
        return array.copy()
    return array.transpose(content["axes"]).copy().transpose(np.argsort(content["axes"]))


_DECODERS: dict[str, Callable[[Any, Fetch], Any]] = {
    "$tensor": lambda content, fetch: fetch(content),
    "$float": lambda content, _: _FLOATS[content],
    "$complex": lambda content, _: complex(*map(float, content)),
    "$bytes": lambda content, _: base64.b64decode(content),
    "$dtype": lambda content, _: find_dtype(content),
    "$device": lambda content, _: torch.device(content),
    "$tuple": lambda content, fetch: tuple(_decode(item, fetch) for item in content),
    "$size": lambda content, _: _decode_size(content),
    "$set": lambda content, fetch: {item for item, _ in _spread([(_decode(each, fetch), None) for each in content])},
    "$frozenset": lambda content, fetch: frozenset(_DECODERS["$set"](content, fetch)),
    "$dict": lambda content, fetch: dict(_spread(_pairs(content, fetch))),
    "$counter": lambda content, fetch: collections.Counter(dict(_spread(_pairs(content, fetch)))),
    "$array": _decode_array,
    "$scalar": lambda content, fetch: _decode_array(content, fetch)[()],
}


def tensor_name(path: Iterable[str]) -> str:
    """The name of the tensor that keys lead to, each as its `name_part`."""
    return "/".join(path)


def name_part(key: Any) -> str:
    """A key as a part of a name; different keys of one dict are different parts."""
    # 1 and "1" are different keys, and "a/b" is one key and not two: "~" marks what would be read wrongly.
    if type(key) is int:
        return str(key)
    if type(key) is not str:
        return f"~3{key!r}"
    escaped = key.replace("~", "~0").replace("/", "~1")
    return f"~2{escaped}" if _NUMBER.fullmatch(key) else escaped


def _in_order(value: Any) -> list[Any]:
    # A set of strings has another order in each process, and names of tensors must not.
    return sorted(value, key=repr) if isinstance(value, set | frozenset) else list(value)


def _identity(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """What two names of one tensor have in common; None where ranks could judge it differently.

    Shards of two parameters may share memory on one rank and not on another, so a DTensor is known by its object; the
    state holds on to it meanwhile. So is a tensor on XLA, which has no address. Empty tensors have none either.
    """
    if is_dtensor(tensor) or tensor.device.type in _WITHOUT_ADDRESSES:
        return type(tensor), id(tensor)
    if tensor.numel() == 0:
        return None
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj()


def _check_tensor(tensor: torch.Tensor, path: tuple[str, ...]) -> None:
    if wraps_tensors(tensor) and not is_dtensor(tensor):
        raise _unsupported(tensor, path, "it is made of other tensors; give those, or what they stand for")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise _unsupported(tensor, path, f"its layout is {tensor.layout}; make it dense and not quantized")
    if tensor.device.type == "meta":
        raise _unsupported(tensor, path, "it is on the meta device and has no values")
    if not is_storable(tensor.dtype):
        raise _unsupported(tensor, path, f"its dtype is {tensor.dtype}; convert it")


def _unsupported(value: Any, path: tuple[str, ...], why: str) -> UnsupportedStateError:
    return UnsupportedStateError(f"{_key_path(path)} is a {_type_name(value)}, which a checkpoint cannot keep: {why}")


def _key_path(path: tuple[str, ...]) -> str:
    return path[0] + "".join(f"[{part!r}]" for part in path[1:])


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


# The files


Extent = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Extents = Annotated[tuple[Extent, ...], Field(max_length=MOST_DIMENSIONS)]
"""A number for each dimension of a tensor. Bounded, for the product of many long numbers takes minutes."""


class Chunk(BaseModel):
    """A piece of a tensor, and the file that has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: FileName
    offsets: Extents
    sizes: Extents

    @property
    def box(self) -> Box:
        """Where in its tensor it belongs."""
        return Box(self.offsets, self.sizes)


class TensorRecord(BaseModel):
    """A tensor's dtype, shape, pieces, and strides where they are not those of a contiguous tensor.

    The files hold every tensor in the order of its indices. The strides say how it lay in memory, which kernels that
    go over memory depend on: a fused optimizer pairs the elements of a parameter and of its moments by their places.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: Extents
    strides: Extents | None = None
    chunks: tuple[Chunk, ...]

    def problem(self, name: str) -> str | None:
        """What is wrong with it."""
        try:
            if not is_storable(find_dtype(self.dtype)):
                return f"tensor {name} has dtype {self.dtype}"
        except KeyError:
            return f"tensor {name} has dtype {self.dtype}, which torch does not know"
        if not covers(self.shape, [chunk.box for chunk in self.chunks]):
            return f"the pieces of tensor {name} do not cover its shape {list(self.shape)} exactly"
        if self.strides is not None and not is_dense(self.shape, self.strides):
            return f"tensor {name} has strides {list(self.strides)}, which its shape {list(self.shape)} does not fill"
        return None


class StateFile(BaseModel):
    """A document, and where the tensors that it names are stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensors: dict[str, TensorRecord]
    value: Any

    def problem(self) -> str | None:
        """What is wrong with the first tensor that is wrong."""
        return next((found for name, record in self.tensors.items() if (found := record.problem(name))), None)


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor with these strides fills its memory: no gap, and no element twice."""
    if len(shape) != len(strides):
        return False
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 1:  # never multiplied by anything but 0
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def kept_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The strides to write down: of a tensor that fills its memory in another order than a contiguous one."""
    if is_dtensor(tensor) or tensor.numel() == 0 or not is_dense(tensor.shape, tensor.stride()):
        return None
    contiguous = tuple(math.prod(tensor.shape[dim + 1 :]) for dim in range(tensor.dim()))
    return None if tensor.stride() == contiguous else tuple(tensor.stride())


def write_state_file(contents: StateFile) -> bytes:
    """The text of the file.

    Raises:
        UnsupportedStateError: it is larger than any that is read.
    """
    tensors = {name: record.model_dump(exclude_none=True) for name, record in contents.tensors.items()}
    text = json.dumps({"tensors": tensors, "value": contents.value}, separators=(",", ":")).encode() + b"\n"
    if len(text) > _LARGEST_STATE_FILE:
        raise UnsupportedStateError(
            f"the state beside its tensors takes {len(text) / 1e6:,.0f} MB as text, more than the "
            f"{_LARGEST_STATE_FILE / 1e6:,.0f} MB that one may have; keep long lists of numbers as tensors or arrays"
        )
    return text


def read_state_file(file: BinaryIO) -> StateFile:
    """What an open file holds.

    Raises:
        DamagedCheckpointError: it cannot be read, or its pieces do not make up its tensors.
    """
    text = file.read(_LARGEST_STATE_FILE + 1)
    if len(text) > _LARGEST_STATE_FILE:
        raise DamagedCheckpointError(f"the saved state has more than {_LARGEST_STATE_FILE} bytes, as none has")
    try:
        contents = StateFile.model_validate(json.loads(text))
    except (ValidationError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"the saved state cannot be read: {error}") from error
    if (problem := contents.problem()) is not None:
        raise DamagedCheckpointError(problem)
    return contents
