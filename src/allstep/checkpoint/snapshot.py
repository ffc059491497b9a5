"""What one rank brings to a save, taken while training waits.

Contract: `take_snapshot` is called by every rank with the same state, and returns when nothing in the result refers to
live tensors or containers any more. Everything after it (writing JSON, hashing, files) happens in the background.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from allstep.checkpoint.division import Piece, own_pieces, piece_key
from allstep.checkpoint.dtypes import dtype_name
from allstep.checkpoint.encoding import encode
from allstep.checkpoint.staging import Staged, Stager
from allstep.errors import UnkeepableError

PER_RANK = "~rank"

Spec = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One rank's part of a save.

    Attributes:
        staged: the tensors that this rank writes, in the bytes of their file.
        state: the document of what all ranks have in common.
        specs: dtype and shape of every tensor that it names, the same on all ranks.
        pieces: those of them that this rank writes.
        per_rank: the document of what this rank alone has.
        per_rank_specs: dtype and shape of the tensors that it names, all of which this rank writes.
    """

    staged: Staged
    state: dict[str, Any]
    specs: dict[str, Spec]
    pieces: tuple[Piece, ...]
    per_rank: Any
    per_rank_specs: dict[str, Spec]


def take_snapshot(state: Mapping[str, Any], per_rank: Any, stager: Stager, rank: int, world_size: int) -> Snapshot:
    """Copy what this rank has to write.

    Args:
        state: nested values by name; tensors that are no DTensors are the same on all ranks.
        per_rank: a nested value that this rank alone has.
        stager: keeps the memory from one save to the next.
        rank, world_size: this rank among those that save.

    Raises:
        UnkeepableError: something in it cannot be kept.
    """
    document: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    of_first: set[str] = set()
    for name, value in state.items():
        if not isinstance(name, str) or not name or "/" in name or name[0] in "~$":
            raise UnkeepableError(f'{name!r} cannot name a part of the state; use a string without "/" in it')
        encoded = encode(value, name)
        document[name] = encoded.document
        tensors.update(encoded.tensors)
        of_first |= encoded.of_first
    own = encode(per_rank, PER_RANK)
    for name, tensor in own.tensors.items():
        if isinstance(tensor, DTensor):
            raise UnkeepableError(
                f"{name} is sharded over ranks, and was given as what this rank alone has; give it as common state"
            )
    pieces = own_pieces(tensors, rank, world_size, of_first)
    staged = stager.stage(
        [
            *((piece_key(piece, tensors[piece.name].shape), values) for piece, values in pieces),
            *((name, values) for name, values in own.tensors.items()),
        ]
    )
    return Snapshot(
        staged, document, _specs(tensors), tuple(piece for piece, _ in pieces), own.document, _specs(own.tensors)
    )


def _specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
