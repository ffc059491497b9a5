"""One file out of a checkpoint, which can be read without allstep.

Contract: in any process, alone. A `.safetensors` file holds tensors by name, under every name that they have; tied
weights are written once for each. A name is made of the keys that lead to the tensor, as they are, with "/" between. A
`.pt` file holds the nested state, with numpy values as tensors and numbers, so that `torch.load` reads it with
`weights_only=True`. The file appears under its name when it is whole.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch

from allstep.checkpoint.catalog import Entry, verify
from allstep.checkpoint.encoding import TensorRecord, decode
from allstep.checkpoint.manifest import STATE
from allstep.checkpoint.reading import CheckpointReader
from allstep.checkpoint.safetensors_file import NOTES, find_dtype, lay_out, stored_as, stored_shape, to_stored
from allstep.checkpoint.storage import open_storage
from allstep.errors import ArgumentError, CheckpointError, DamagedCheckpointError


def export(entry: Entry, path: str, only: str | None = None) -> None:
    """Write a checkpoint's state to one file.

    Args:
        entry: of the checkpoint.
        path: ends with ".safetensors" or ".pt".
        only: a part of the state, such as "model"; the tensors' names then lack it, as `load_state_dict` expects.

    Raises:
        ArgumentError: the path ends otherwise, or there is no such folder.
        DamagedCheckpointError: the checkpoint is damaged.
        CheckpointError: it has no such part, or no tensor for a .safetensors file, or two would have one name.
    """
    suffix = os.path.splitext(path)[1]
    if suffix not in (".safetensors", ".pt"):
        raise ArgumentError(f"cannot export to {path}: a file's name must end with .safetensors or .pt")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ArgumentError(f"cannot export to {path}: there is no folder {folder}")
    storage = open_storage(entry.folder)
    # All is hashed first: nobody looks at the hashes again once the values have left the checkpoint.
    problems = verify(entry)
    if entry.manifest is None or problems:
        raise DamagedCheckpointError(f"checkpoint {entry.folder}/{entry.name} is damaged: {'; '.join(problems)}")
    with CheckpointReader(storage, entry.name, entry.manifest) as reader:
        parts = reader.state_file(STATE).value
        if only is not None and only not in parts:
            raise CheckpointError(f"checkpoint {entry.name} has no part {only!r}; it has {', '.join(sorted(parts))}")
        # In the same folder, so that the rename is atomic. A name that nobody can know before, and never an existing
        # file: in a folder that others write to, a link could lead the write elsewhere.
        temporary = f"{path}.tmp-{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb") as file:
                if suffix == ".pt":
                    state = _portable(reader.read_state({}))
                    torch.save(state if only is None else state[only], file)
                else:
                    _write_safetensors(reader, file, only, {"format": "pt", "step": str(entry.manifest.step)})
            os.replace(temporary, path)
        finally:
            if os.path.lexists(temporary):
                os.unlink(temporary)


@dataclass(frozen=True, slots=True, eq=False)
class _TensorPlace:
    """Stands for a tensor in a decoded state before its values are read."""

    name: str
    record: TensorRecord

    def numpy(self) -> _TensorPlace:
        """What `decode` asks of the tensor behind a numpy array: the values are the same."""
        return self


def _write_safetensors(reader: CheckpointReader, file: BinaryIO, only: str | None, metadata: dict[str, str]) -> None:
    """Write tensor by tensor, so that never more than one is in memory."""
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
    dtypes = {key: find_dtype(place.record.dtype) for key, place in places.items()}
    layout = lay_out(
        ((key, stored_as(dtypes[key]), stored_shape(dtypes[key], place.record.shape)) for key, place in places.items()),
        metadata,
    )
    file.write(layout.header)
    for slot in layout.slots:
        place = places[slot.key]
        tensor = to_stored(reader.read_tensor(place.name, place.record))
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


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
