"""One file out of a checkpoint, which needs no allstep to be read.

Contract: in any process, alone. A `.safetensors` file holds tensors by name, under every name that they have: tied
weights come once for each. A name is made of the keys that lead to the tensor, as they are, with "/" between. A `.pt`
file holds the nested state, with numpy values as tensors and numbers, so that `torch.load` reads it as it is. The file
appears under its name when it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from allstep.checkpoint.catalog import Entry, examine
from allstep.checkpoint.encoding import decode
from allstep.checkpoint.index import TensorRecord
from allstep.checkpoint.manifest import STATE
from allstep.checkpoint.reading import Reader
from allstep.checkpoint.safetensors_file import find_dtype, lay_out, stored_as, stored_shape, to_stored
from allstep.checkpoint.storage import open_storage
from allstep.errors import CheckpointError, DamagedCheckpointError


def export(entry: Entry, path: str, only: str | None = None) -> None:
    """Write a checkpoint's state to one file.

    Args:
        entry: of the checkpoint.
        path: ends with ".safetensors" or ".pt".
        only: a part of the state, such as "model"; the tensors' names then lack it, as `load_state_dict` expects.

    Raises:
        CheckpointError: the checkpoint is damaged, has no such part, or the path ends otherwise or is in no folder; or
            there is no tensor for a .safetensors file, or two would have one name.
    """
    suffix = os.path.splitext(path)[1]
    if suffix not in (".safetensors", ".pt"):
        raise CheckpointError(f"cannot export to {path}: a file's name must end with .safetensors or .pt")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise CheckpointError(f"cannot export to {path}: there is no folder {folder}")
    storage = open_storage(entry.folder)
    problems = examine(storage, entry.name, "full")
    if entry.manifest is None or problems:
        raise DamagedCheckpointError(f"checkpoint {entry.folder}/{entry.name} is damaged: {'; '.join(problems)}")
    with Reader(storage, entry.name, entry.manifest) as reader:
        parts = reader.saved(STATE).value
        if only is not None and only not in parts:
            raise CheckpointError(f"checkpoint {entry.name} has no part {only!r}; it has {', '.join(sorted(parts))}")
        temporary = f"{path}.tmp-{os.getpid()}"
        try:
            if suffix == ".pt":
                state = _portable(reader.read_state({}))
                torch.save(state if only is None else state[only], temporary)
            else:
                _write_safetensors(reader, temporary, only, {"format": "pt", "step": str(entry.manifest.step)})
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)


@dataclass(frozen=True, slots=True, eq=False)
class _Unread:
    """Stands for a tensor where only its place matters."""

    name: str
    record: TensorRecord

    def numpy(self) -> _Unread:
        """As an array's content it is the same."""
        return self


def _write_safetensors(reader: Reader, path: str, only: str | None, metadata: dict[str, str]) -> None:
    """Tensor by tensor, so that never more than one is in memory."""
    saved = reader.saved(STATE)

    def fetch(name: str) -> Any:
        return _Unread(name, saved.tensors[name])

    records: dict[str, _Unread] = {}
    for keys, unread in _unread_in(decode(saved.value if only is None else saved.value[only], fetch)):
        key = "/".join(keys) or str(only)
        if key in records:
            raise CheckpointError(f"two tensors would have the name {key!r}; choose a .pt file")
        records[key] = unread
    if not records:
        raise CheckpointError("there are no tensors to export; choose a .pt file")
    dtypes = {key: find_dtype(unread.record.dtype) for key, unread in records.items()}
    layout = lay_out(
        (
            (key, stored_as(dtypes[key]), stored_shape(dtypes[key], unread.record.shape))
            for key, unread in records.items()
        ),
        metadata,
    )
    with open(path, "wb") as file:
        file.write(layout.header)
        for slot in layout.slots:
            unread = records[slot.key]
            tensor = to_stored(reader.read_tensor(unread.name, unread.record))
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _unread_in(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], _Unread]]:
    """The tensors of a nested state, each with the keys that lead to it."""
    if isinstance(value, _Unread):
        yield keys, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _unread_in(item, (*keys, str(key)))
    elif isinstance(value, list | tuple | set | frozenset):
        for at, item in enumerate(value):
            yield from _unread_in(item, (*keys, str(at)))


def _portable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _portable(item) for key, item in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_portable(item) for item in value)
    return value
