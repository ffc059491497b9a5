"""What a folder of checkpoints looks like: the names in it, as pure functions.

Contract: everything that writes, lists or removes checkpoints takes names from here. A checkpoint is a folder
`save-ORDER-step-STEP`; ORDER counts the saves begun in the parent folder, so that the newest has the highest and no
name is used twice, whatever steps a run goes back to. In it:

    manifest.json            written last; a folder without it is no checkpoint
    state.json               the state's own values, and where its tensors lie
    rank_00000.safetensors   the tensors that rank 0 wrote
    rank_00000.json          what rank 0 alone knows, such as its random generators
    set_aside.json           only where somebody found the checkpoint damaged: why
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MANIFEST = "manifest.json"
STATE = "state.json"
SET_ASIDE = "set_aside.json"

_NAME = re.compile(r"save-(\d{6,})-step-(\d+)")
_TEMPORARY = re.compile(r"tmp-save-(\d{6,})-step-\d+-[0-9a-f]+")


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """A checkpoint's place in its folder; the greatest is the newest."""

    order: int
    step: int

    def __str__(self) -> str:
        return f"save-{self.order:06d}-step-{self.step}"

    def temporary(self, token: str) -> str:
        """The folder that is written before it is renamed; `token` is hexadecimal and new in each process."""
        return f"tmp-{self}-{token}"


def read_name(folder: str) -> Name | None:
    """The `Name` behind a folder's name; None where it is something else."""
    match = _NAME.fullmatch(folder)
    name = Name(int(match[1]), int(match[2])) if match else None
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
    """Where a rank writes what it alone knows."""
    return f"rank_{rank:05d}.json"
