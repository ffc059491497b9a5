"""A checkpoint's state in files that can be read without allstep: one, or a folder as the Hugging Face hub has them.

Contract: in any process, alone. What is written appears under its name when it is whole. A tensor's name is made of the
keys that lead to it, as they are, with "/" between.

- A `.safetensors` file holds tensors by name, under every name that they have; tied weights are written once for each.
- A `.pt` file holds the nested state, with numpy values as tensors and numbers, so that `torch.load` reads it with
  `weights_only=True`. It is the only one for which all of the state is in memory at once.
- A folder holds `model.safetensors`, or, where that would be larger than `max_shard_size`, files
  `model-00001-of-0000N.safetensors` and `model.safetensors.index.json`, which says which file has which tensor. Tied
  weights are written once, under their first name. The other names are in the files' metadata, as the hub's own tools
  write them. `World.load_pretrained` reads such a folder.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from allstep.checkpoint.catalog import Entry, verify
from allstep.checkpoint.encoding import TensorRecord, decode
from allstep.checkpoint.manifest import STATE
from allstep.checkpoint.reading import CheckpointReader
from allstep.checkpoint.safetensors_file import NOTES, find_dtype, lay_out, stored_as, stored_shape, to_stored
from allstep.checkpoint.storage import open_storage
from allstep.errors import ArgumentError, CheckpointError, DamagedCheckpointError

LARGEST_SHARD = "5GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def export(entry: Entry, path: str, only: str | None = None, max_shard_size: int | str = LARGEST_SHARD) -> None:
    """Write a checkpoint's state to one file, or a part of it to a folder.

    Args:
        entry: of the checkpoint.
        path: ends with ".safetensors" or ".pt", or has no such ending and is a folder that is not there yet, or is
            empty.
        only: a part of the state, such as "model"; the tensors' names then lack it, as `load_state_dict` expects. A
            folder holds one part, by default "model".
        max_shard_size: bytes of tensors in each file of a folder, or a text such as "5GB", "500MB". One tensor that is
            larger has a file of its own.

    Raises:
        ArgumentError: the path ends otherwise, there is no such folder, or one that is not empty; or the size is none.
        DamagedCheckpointError: the checkpoint is damaged.
        CheckpointError: it has no such part, or no tensor for a .safetensors file, or two would have one name.
    """
    path = path.rstrip("/")
    suffix = os.path.splitext(path)[1]
    is_folder = suffix not in (".safetensors", ".pt")
    limit = _bytes(max_shard_size)
    if is_folder and suffix in _FILES:
        raise ArgumentError(
            f"cannot export to {path}: a file's name must end with .safetensors or .pt, and a folder's must not end "
            f"with {suffix}"
        )
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ArgumentError(f"cannot export to {path}: there is no folder {folder}")
    if is_folder and os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise ArgumentError(f"cannot export to {path}: it is there already; give a new folder, or an empty one")
    storage = open_storage(entry.folder)
    # All is hashed first: nobody looks at the hashes again once the values have left the checkpoint.
    problems = verify(entry)
    if entry.manifest is None or problems:
        raise DamagedCheckpointError(f"checkpoint {entry.folder}/{entry.name} is damaged: {'; '.join(problems)}")
    notes = {"format": "pt", "step": str(entry.manifest.step)}
    with CheckpointReader(storage, entry.name, entry.manifest) as reader:
        parts = reader.state_file(STATE).value
        only = "model" if is_folder and only is None else only
        if only is not None and only not in parts:
            remedy = "; a folder holds one part, choose which by only=" if is_folder else ""
            raise CheckpointError(
                f"checkpoint {entry.name} has no part {only!r}; it has {', '.join(sorted(parts))}{remedy}"
            )
        # In the same folder, so that the rename is atomic. A name that nobody can know before, and never an existing
        # file: in a folder that others write to, a link could lead the write elsewhere.
        temporary = f"{path}.tmp-{secrets.token_hex(8)}"
        try:
            if is_folder:
                os.mkdir(temporary)
                _write_folder(reader, temporary, _named_places(reader, only), notes, limit)
            elif suffix == ".pt":
                with open(temporary, "xb") as file:
                    state = _portable(reader.read_state({}))
                    torch.save(state if only is None else state[only], file)
            else:
                _write_safetensors(reader, temporary, _named_places(reader, only), notes)
            os.replace(temporary, path)
        finally:
            if os.path.isdir(temporary):
                shutil.rmtree(temporary)
            elif os.path.lexists(temporary):
                os.unlink(temporary)


_FILES = (".bin", ".pth", ".ckpt", ".json", ".gguf", ".onnx", ".h5", ".npz", ".pickle", ".pkl")
"""Endings of files that somebody could expect to get."""


def _bytes(size: int | str) -> int:
    """A size in bytes. Raises ArgumentError."""
    match = re.fullmatch(r"\s*([0-9]{1,15})\s*([KMGT]?B?)\s*", str(size).upper())
    unit = "" if match is None else match[2] if match[2] in _UNITS else f"{match[2]}B" if match[2] != "B" else ""
    if match is None or isinstance(size, bool) or int(match[1]) < 1:
        raise ArgumentError(f"max_shard_size is {size!r}; give a number of bytes, or a text such as 5GB or 500MB")
    return int(match[1]) * _UNITS[unit]


@dataclass(frozen=True, slots=True, eq=False)
class _TensorPlace:
    """Stands for a tensor in a decoded state before its values are read."""

    name: str
    record: TensorRecord

    def numpy(self) -> _TensorPlace:
        """What `decode` asks of the tensor behind a numpy array: the values are the same."""
        return self


def _named_places(reader: CheckpointReader, only: str | None) -> dict[str, _TensorPlace]:
    """The tensors of the state, or of a part of it, by the names that they get.

    Raises:
        CheckpointError: there are none, or two would have one name.
    """
    contents = reader.state_file(STATE)

    def fetch(name: str) -> Any:
        return _TensorPlace(name, contents.tensors[name])

    places: dict[str, _TensorPlace] = {}
    for keys, place in _places_in(decode(contents.value if only is None else contents.value[only], fetch)):
        key = "/".join(keys) or str(only)  # a part that is one tensor has no keys of its own
        if key == NOTES:
            raise CheckpointError(f"a tensor would have the name {key!r}, which is the file's own; choose a .pt file")
        if key in places:
            raise CheckpointError(f"two tensors would have the name {key!r}; choose a .pt file")
        places[key] = place
    if not places:
        raise CheckpointError("there are no tensors to export; choose a .pt file")
    return places


def _write_safetensors(
    reader: CheckpointReader, path: str, places: Mapping[str, _TensorPlace], notes: Mapping[str, str]
) -> None:
    """Write a file tensor by tensor, so that never more than one is in memory."""
    dtypes = {key: find_dtype(place.record.dtype) for key, place in places.items()}
    layout = lay_out(
        ((key, stored_as(dtypes[key]), stored_shape(dtypes[key], place.record.shape)) for key, place in places.items()),
        dict(notes),
    )
    with open(path, "xb") as file:
        file.write(layout.header)
        for slot in layout.slots:
            place = places[slot.key]
            tensor = to_stored(reader.read_tensor(place.name, place.record))
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _write_folder(
    reader: CheckpointReader, folder: str, places: Mapping[str, _TensorPlace], notes: dict[str, str], limit: int
) -> None:
    """Write tensors to files of at most `limit` bytes each, and an index where there are several."""
    first: dict[str, str] = {}  # the name under which each tensor of the checkpoint is written
    for key, place in places.items():
        if first.setdefault(place.name, key) != key:
            notes[key] = first[place.name]
    files: list[dict[str, _TensorPlace]] = []
    room = total = 0
    for key in first.values():
        place = places[key]
        size = math.prod(place.record.shape) * find_dtype(place.record.dtype).itemsize
        if not files or size > room:
            files.append({})
            room = limit
        files[-1][key] = place
        room, total = room - size, total + size
    if len(files) == 1:
        _write_safetensors(reader, os.path.join(folder, "model.safetensors"), files[0], notes)
        return
    placed: dict[str, str] = {}
    for number, inside in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_safetensors(reader, os.path.join(folder, name), inside, notes)
        placed |= dict.fromkeys(inside, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    with open(os.path.join(folder, "model.safetensors.index.json"), "x", encoding="utf-8") as file:
        json.dump(index, file, indent=2)
        file.write("\n")


def _places_in(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], _TensorPlace]]:
    """The tensors of a nested state, each with the keys that lead to it."""
    if isinstance(value, _TensorPlace):
        yield keys, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _places_in(item, (*keys, str(key)))
    elif isinstance(value, list | tuple | set | frozenset):
        for at, item in enumerate(value):
            yield from _places_in(item, (*keys, str(at)))


def _portable(value: Any) -> Any:
    # torch.load(weights_only=True) refuses numpy objects.
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _portable(item) for key, item in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_portable(item) for item in value)
    return value
