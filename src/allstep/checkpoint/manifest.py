"""The names in a folder of checkpoints, and the manifest that makes a folder of files a checkpoint.

A checkpoint is a folder `save-ORDER-step-STEP`. ORDER counts the saves that were begun in the parent folder. The newest
has the highest, and no name is used twice, whatever step a run goes back to. In it:

    manifest.json            written last; a folder without it is no checkpoint
    state.json               the values of the state, and where its tensors lie
    rank_00000.safetensors   the tensors that rank 0 wrote
    rank_00000.json          what rank 0 has for itself, such as its random generators
    set_aside.json           only in a checkpoint that is quarantined: what was found wrong

Contract: whatever writes, lists or removes checkpoints takes names from here. `write_manifest` gives the bytes of
`manifest.json`, which carry their own hash. `read_manifest` takes bytes from anywhere. It gives a `Manifest` whose
fields all have their types and whose file names are plain names, or raises DamagedCheckpointError. Pure functions;
imports no torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from allstep.checkpoint.storage import HASH_ALGORITHM, Storage, hash_bytes
from allstep.errors import CheckpointError, DamagedCheckpointError, NewerCheckpointError

MANIFEST = "manifest.json"
STATE = "state.json"
QUARANTINE = "set_aside.json"  # the file's name belongs to format 1

# Six digits or more, so that a listing by name is in order up to a million saves.
_NAME = re.compile(r"save-(\d{6,})-step-(\d+)")
_TEMPORARY = re.compile(r"tmp-save-(\d{6,})-step-\d+-[0-9a-f]+")


@dataclass(frozen=True, slots=True, order=True)
class CheckpointName:
    """A checkpoint's place in its folder; the greatest is the newest."""

    order: int
    step: int

    def __str__(self) -> str:
        return f"save-{self.order:06d}-step-{self.step}"

    def temporary(self, token: str) -> str:
        """The folder that is written before it is renamed; `token` is hexadecimal and new in each process."""
        return f"tmp-{self}-{token}"


def read_name(folder: str) -> CheckpointName | None:
    """The `CheckpointName` behind a folder's name; None where it is something else."""
    match = _NAME.fullmatch(folder)
    name = CheckpointName(int(match[1]), int(match[2])) if match else None
    # Written back and compared: "save-0000007-step-1" reads as 7 too, and is no name of ours.
    return name if str(name) == folder else None


def is_temporary(folder: str) -> bool:
    """Whether a folder's name is that of a save that has not been committed."""
    return _TEMPORARY.fullmatch(folder) is not None


def next_order(folders: list[str]) -> int:
    """The first order that no folder's name, finished or not, has taken."""
    taken = [int(match[1]) for name in folders if (match := _NAME.fullmatch(name) or _TEMPORARY.fullmatch(name))]
    return max(taken, default=0) + 1


def tensor_file(rank: int) -> str:
    """Where a rank writes tensors."""
    return f"rank_{rank:05d}.safetensors"


def value_file(rank: int) -> str:
    """Where a rank writes what it has for itself."""
    return f"rank_{rank:05d}.json"


FORMAT = 2
LARGEST_MANIFEST = 64 << 20  # bytes; a larger file is not read at all

# No slash and no leading dot: a manifest from elsewhere cannot name a file outside its folder.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Time = Annotated[float, Field(ge=0, lt=253402300800)]  # seconds since 1970, up to the year 9999, as calendars go


class FileRecord(BaseModel):
    """A file's size in bytes and its hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Count
    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Branch(BaseModel):
    """A line of saves, each made by going on from the one before it, and how far it belongs to a lineage.

    Attributes:
        id: new with each line; "" for all that was saved under format 1, which did not tell lines apart.
        through: the order of the last save of the line that belongs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{0,32}$")]
    through: Count


class Manifest(BaseModel):
    """What a checkpoint says about itself.

    Attributes:
        format: of the files; this version reads 1 and 2.
        order: the number of this save in its folder, from 1.
        step: the iteration after which it was taken.
        world_size: of the run that saved it.
        created: seconds since 1970.
        versions: of allstep, torch and Python.
        metrics: by name.
        facts: what the caller gave, such as the run's configuration.
        files: every file but the manifest.
        parent: the save that this one came from, by the name of its folder, or by its address where that is elsewhere;
            None at a beginning.
        lineage: the lines of saves that lead to this one, its own last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    format: Annotated[int, Field(ge=1)]
    order: Count
    step: Count
    world_size: Annotated[int, Field(ge=1, lt=2**31)]
    created: Time
    versions: dict[str, str]
    metrics: dict[str, float]
    facts: dict[str, Any]
    files: dict[FileName, FileRecord]
    parent: Annotated[str, Field(max_length=4096)] | None = None
    lineage: Annotated[tuple[Branch, ...], Field(max_length=10_000)] = ()

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(record.size for record in self.files.values())


def write_manifest(manifest: Manifest) -> bytes:
    """The bytes of the manifest's file."""
    body = json.loads(manifest.model_dump_json())
    return json.dumps({"manifest": body, HASH_ALGORITHM: hash_bytes(_canonical(body))}, indent=1).encode() + b"\n"


def read_manifest(text: bytes) -> Manifest:
    """The manifest in a file's bytes.

    Raises:
        DamagedCheckpointError: it is no manifest, or not whole.
        NewerCheckpointError: it is of a later format.
    """
    try:
        outer = json.loads(text)
        body = outer["manifest"]
        if outer[HASH_ALGORITHM] != hash_bytes(_canonical(body)):
            raise DamagedCheckpointError("the manifest's text does not have the hash that it states")
        if isinstance(body.get("format"), int) and body["format"] > FORMAT:
            raise NewerCheckpointError(
                f"the checkpoint has format {body['format']}; this allstep reads up to {FORMAT}, so use a newer one"
            )
        return Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedCheckpointError(f"the manifest's {where} is wrong: {first['msg']}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"the manifest cannot be read: {type(error).__name__}: {error}") from error


def _canonical(body: Any) -> bytes:
    # The hash is of the values and not of the file's bytes, so that it does not depend on white space.
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def load_manifest(storage: Storage, folder: str) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedCheckpointError: there is none, or its contents are no manifest.
        CheckpointError: it cannot be read.
    """
    try:
        size = storage.files(folder).get(MANIFEST)
        if size is None:
            raise DamagedCheckpointError(f"there is no {MANIFEST}")
        if size > LARGEST_MANIFEST:
            raise DamagedCheckpointError(f"{MANIFEST} has {size} bytes, more than any manifest")
        with storage.open(folder, MANIFEST) as file:
            return read_manifest(file.read())
    except DamagedCheckpointError:
        raise
    except Exception as error:  # file systems behind fsspec have errors of their own
        raise CheckpointError(f"{MANIFEST} cannot be read: {error}") from error
