"""The names of a module's tensors as the module has them that nothing was put around.

Contract: DDP, DataParallel and torch.compile give the tensors of what they wrap longer names, wherever in a module that
is. A run in another mesh wraps other parts, or none, so what is kept goes by plain names.
"""

from __future__ import annotations

from torch import nn

from allstep.parallel.wrap import unwrap


class PlainNames:
    """The names of a module's tensors and submodules without what wrappers add to them."""

    def __init__(self, module: nn.Module) -> None:
        # "0.module." becomes "0." for a DDP module under the name 0, "0._orig_mod." for a compiled one.
        self._prefixes = [
            (f"{name}.{inner}.", f"{name}.")
            for name, each in module.named_modules(remove_duplicate=False)
            if name and unwrap(each) is not each
            for inner, _ in each.named_children()
        ][::-1]  # the innermost first

    def plain(self, name: str) -> str:
        """The name of a tensor."""
        for wrapped, plain in self._prefixes:
            if name.startswith(wrapped):
                name = plain + name[len(wrapped) :]
        return name

    def plain_module(self, name: str) -> str:
        """The name of a submodule."""
        return self.plain(f"{name}.")[:-1]  # with a dot, as prefixes end
