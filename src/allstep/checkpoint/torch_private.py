"""Names that torch does not promise to keep, for `checkpoint`: each behind one function that goes on without it.

Contract: no other module of this package uses a private name of torch. Each function looks for its name when it is
called, so that a torch without it costs one warning and some speed, and never an AttributeError.

| name | what for | since torch | without it |
| --- | --- | --- | --- |
| Tensor.__tensor_flatten__ | knowing a tensor that is made of others | before 2.9 | saving one fails in the copy |
| _metadata of a state dict | the versions of submodules | before 2.9 | saved without versions |

2.9 is the oldest torch that allstep supports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def wraps_tensors(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a subclass that is made of other tensors, as quantised weights of torchao are.

    Asks for `__tensor_flatten__`, the protocol of torch.compile for such classes since before torch 2.9. Without it
    none is recognised; a tensor that has no memory of its own then fails when it is copied, which fails the save.
    """
    return hasattr(type(tensor), "__tensor_flatten__")


def module_versions(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The version of each submodule, which `Module.state_dict` hangs on its result for `load_state_dict` to upgrade by.

    Uses the attribute `_metadata` of a state dict, which torch has set since before 2.9. Without it there are no
    versions, and `load_state_dict` takes the state for one of the earliest version, as with any dict of tensors.
    """
    versions = getattr(state, "_metadata", None)
    return versions if isinstance(versions, dict) else None


def set_module_versions(state: Any, versions: dict[str, Any]) -> None:
    """Hang the versions of submodules on an `OrderedDict` that `load_state_dict` is to be given."""
    state._metadata = versions
