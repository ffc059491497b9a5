"""Where a checkpoint's tensors lie, and the document that names them: what `state.json` and `rank_N.json` hold.

Contract: like the manifest, read from bytes that anybody may have written: `read_saved` gives a `Saved` in which every
tensor's pieces cover it exactly, or DamagedCheckpointError.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from allstep.checkpoint.manifest import Count, FileName
from allstep.checkpoint.safetensors_file import find_dtype, is_storable
from allstep.checkpoint.sharding import Piece, covers
from allstep.errors import DamagedCheckpointError


class Chunk(BaseModel):
    """A piece of a tensor and the file that has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: FileName
    offsets: tuple[Count, ...]
    sizes: tuple[Count, ...]

    def piece(self, name: str) -> Piece:
        """The piece as a box."""
        return Piece(name, self.offsets, self.sizes)


class TensorRecord(BaseModel):
    """A tensor's dtype, shape and pieces."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: Annotated[tuple[Count, ...], Field(max_length=64)]
    chunks: tuple[Chunk, ...]

    def problem(self, name: str) -> str | None:
        """What is wrong with it."""
        try:
            if not is_storable(find_dtype(self.dtype)):
                return f"tensor {name} has dtype {self.dtype}"
        except KeyError:
            return f"tensor {name} has dtype {self.dtype}, which torch does not know"
        if not covers(self.shape, [chunk.piece(name) for chunk in self.chunks]):
            return f"the pieces of tensor {name} do not cover its shape {list(self.shape)} exactly"
        return None


class Saved(BaseModel):
    """A document and the tensors that it names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensors: dict[str, TensorRecord]
    value: Any

    def problem(self) -> str | None:
        """What is wrong with the first tensor that is wrong."""
        return next((found for name, record in self.tensors.items() if (found := record.problem(name))), None)


def write_saved(saved: Saved) -> bytes:
    """The text of the file."""
    tensors = {name: record.model_dump() for name, record in saved.tensors.items()}
    return json.dumps({"tensors": tensors, "value": saved.value}, separators=(",", ":")).encode() + b"\n"


def read_saved(text: bytes) -> Saved:
    """What a file's bytes hold.

    Raises:
        DamagedCheckpointError: it cannot be read, or its pieces do not make up its tensors.
    """
    try:
        saved = Saved.model_validate(json.loads(text))
    except (ValidationError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"the saved state cannot be read: {error}") from error
    if (problem := saved.problem()) is not None:
        raise DamagedCheckpointError(problem)
    return saved
