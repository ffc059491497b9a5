"""torch's stores, by one name for the type checker and at run time.

A torch built without distributed has none; a world of one, which uses none, still imports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
else:
    PrefixStore, Store, TCPStore = (getattr(dist, name, None) for name in ("PrefixStore", "Store", "TCPStore"))

__all__ = ["PrefixStore", "Store", "TCPStore"]
