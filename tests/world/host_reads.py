"""A stand-in for `torch.cuda.set_sync_debug_mode`: counts where the host reads what would lie on a device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostReads(TorchDispatchMode):
    """Counts reads of the values of a module's parameters, and of all that is computed from them.

    Attributes:
        reads: how often each operation read a value since this was entered, or cleared.
    """

    READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "_unique2")
    COPIES = ("cpu", "numpy", "tolist")  # which do nothing on the host, and wait for a device

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self._followed: dict[int, torch.UntypedStorage] = {}
        self._methods = {name: getattr(torch.Tensor, name) for name in self.COPIES}
        self._follow(list(module.parameters()))

    def __enter__(self) -> HostReads:
        super().__enter__()
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, self._counting(name, method))
        return self

    def __exit__(self, *exc: Any) -> None:
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, method)
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        follows = any(self._follows(each) for each in tree_leaves((args, kwargs or {})))
        result = func(*args, **(kwargs or {}))
        if follows:
            name = func._schema.name.removeprefix("aten::")
            self.reads.update([name] if name in self.READS else [])
            self._follow(result)
        return result

    def _counting(self, name: str, method: Any) -> Any:
        def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.reads.update([name] if self._follows(tensor) else [])
            return method(tensor, *args, **options)

        return counted

    def _follow(self, value: Any) -> None:
        for each in tree_leaves(value):
            if isinstance(each, torch.Tensor):
                # The storage is held, so that no other one gets its address.
                self._followed[each.untyped_storage()._cdata] = each.untyped_storage()

    def _follows(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self._followed
