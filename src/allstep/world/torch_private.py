"""Names that torch does not promise to keep, for `world`: each with a feature test and a way to go on without it.

Contract: no other module of this package uses a private name of torch. A function here looks its name up when it is
called. Where this torch lacks it, one warning says what is given up, and the call does what it can by public names.
None raises AttributeError, above all not on the way out of a failure. All names were there before torch 2.9, the
oldest that allstep supports.

| name | what for | without it |
| --- | --- | --- |
| torch._C._distributed_c10d | the stores' types, for the type checker alone | only type checks are affected |
| distributed_c10d._get_default_store | the store of a group that the user's code opened | rank 0 serves one |
| distributed_c10d._world.pg_map | finding all gloo groups, to leave without waiting for them | only allstep's |
| distributed_c10d._abort_process_group | leaving nccl's groups without waiting | each group's own `abort` |
"""

from __future__ import annotations

import contextlib
import socket
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
else:
    # A torch built without distributed has none; a world of one, which uses none, still imports.
    PrefixStore, Store, TCPStore = (getattr(dist, name, None) for name in ("PrefixStore", "Store", "TCPStore"))

__all__ = ["PrefixStore", "Store", "TCPStore", "abort_nccl_groups", "default_store", "open_groups"]

_STORE_S = 60.0
_warned: set[str] = set()


def default_store() -> Store:
    """The store of the default process group. Collective: without torch's own, rank 0 serves one for all."""
    get = _c10d("_get_default_store")
    if get is not None:
        store: Store = get()
        return store
    _warn_once("_get_default_store", "rank 0 serves a store for the ranks of the adopted group")
    return _own_store()


def open_groups(known: Sequence[dist.ProcessGroup]) -> dict[dist.ProcessGroup, str]:
    """All process groups of this process and their backends.

    Args:
        known: the groups that allstep made; with the default group, what is found where torch does not tell.
    """
    world = _c10d("_world")
    groups = getattr(world, "pg_map", None)
    if groups is not None:
        return {group: str(found[0]) for group, found in groups.items()}
    _warn_once("_world.pg_map", "leaving after an error may wait for process groups that the script made itself")
    every = [dist.group.WORLD, *known]
    return {group: dist.get_backend(group) for group in every if group is not None}


def abort_nccl_groups(groups: Sequence[dist.ProcessGroup]) -> None:
    """Take all groups down without waiting for their work, where nccl is among them."""
    abort = _c10d("_abort_process_group")
    if abort is not None:
        abort()
        return
    _warn_once("_abort_process_group", "leaving after an error may wait for collectives on the GPU")
    for group in groups:
        with contextlib.suppress(RuntimeError, AttributeError):  # a group whose backend cannot abort
            group.abort()
    dist.destroy_process_group()


def _c10d(name: str) -> Any:
    return getattr(dist.distributed_c10d, name, None)


def _own_store() -> Store:
    served: list[TCPStore] = []
    address: list[Any] = [None]
    if dist.get_rank() == 0:
        limit = timedelta(seconds=_STORE_S)
        served = [TCPStore("127.0.0.1", 0, None, True, limit, wait_for_workers=False)]
        address = [(socket.gethostname(), served[0].port)]
    dist.broadcast_object_list(address, src=0)
    if served:
        return served[0]
    host, port = address[0]
    return TCPStore(host, port, None, False, timedelta(seconds=_STORE_S), wait_for_workers=False)


def _warn_once(name: str, consequence: str) -> None:
    if name in _warned:
        return
    _warned.add(name)
    warnings.warn(
        f"this torch, {torch.__version__}, has no {name}: {consequence}; update allstep",
        RuntimeWarning,
        stacklevel=4,
    )
