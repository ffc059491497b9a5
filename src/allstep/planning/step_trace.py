"""The memory and the messages of a step, as its operations come by.

Contract: in a `StepTrace` block each storage that an operation makes is noted when it is made, resized and freed, and
each collective with its bytes. Storages from before are noted by `hold`. What a storage holds is often known only
later, when it has become a gradient or a state of the optimizer: `hold` may be called then, and `memory` goes through
the whole record once more. Nothing is kept alive by it. The tensors may have values or not; what kernels take for
themselves while they run is not seen.

The idea of following storages by weak references is that of torch's own `MemTracker`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from allstep.parallel import is_dtensor
from allstep.planning.memory_plan import KINDS, MemoryUse, Traffic
from allstep.planning.torch_private import Operations, group_name, is_made_by

# Each collective's operations: where the tensors are that are counted, and whether an input is multiplied by the ranks.
_COLLECTIVES = {
    "_allgather_base_": ("all-gather", 0, False),
    "allgather_": ("all-gather", 0, False),
    "allgather_into_tensor_coalesced_": ("all-gather", 0, False),
    "_reduce_scatter_base_": ("reduce-scatter", 1, False),
    "reduce_scatter_": ("reduce-scatter", 1, False),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1, False),
    "allreduce_": ("all-reduce", 0, False),
    "allreduce_coalesced_": ("all-reduce", 0, False),
    "broadcast_": ("broadcast", 0, False),
    "alltoall_base_": ("all-to-all", 1, False),
    "alltoall_": ("all-to-all", 1, False),
    "all_gather_into_tensor": ("all-gather", 0, True),
    "all_gather_into_tensor_coalesced": ("all-gather", 0, True),
    "reduce_scatter_tensor": ("reduce-scatter", 0, False),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 0, False),
    "all_reduce": ("all-reduce", 0, False),
    "all_reduce_coalesced": ("all-reduce", 0, False),
    "broadcast": ("broadcast", 0, False),
    "all_to_all_single": ("all-to-all", 0, False),
    "shard_dim_alltoall": ("all-to-all", 0, False),
}
_BEFORE = ("parameters", "optimizer", "gradients", "inputs", "communication")
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")


class StepTrace(Operations):  # type: ignore[no-untyped-call]
    """Follows storages and collectives; see above.

    Attributes:
        phase: where the step is; whoever runs it says so.
    """

    def __init__(self, groups: Mapping[str, tuple[str, int]], mode: Any = None) -> None:
        """Follow tensors.

        Args:
            groups: dimension and size of each process group, by its name.
            mode: what `fake_tensors` gave, for tensors of its; None for those with values.
        """
        super().__init__()
        self._mode = mode  # the propagation of DTensors' layouts has a mode of its own, whose tensors cost nothing
        self.phase = "forward"
        self._groups = groups
        self._changes: list[tuple[int, int, str]] = []  # (number of the storage, bytes more, phase), in order
        self._numbers: Any = WeakIdKeyDictionary()
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sizes: dict[int, int] = {}
        self._kinds: dict[int, str] = {}
        self._on_host: set[int] = set()
        self._traffic: dict[tuple[str, str, int], list[int]] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> StepTrace:
        resize = self._resize

        def resize_and_note(storage: torch.UntypedStorage, size: int) -> Any:
            given = resize(storage, size)
            self._resized(storage)
            return given

        # `fully_shard` frees gathered parameters by it, which is no operation.
        torch.UntypedStorage.resize_ = resize_and_note  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def hold(self, kind: str, tensors: Iterable[torch.Tensor], *, on_host: bool = False) -> None:
        """Say what the storages of these tensors hold; of several words on one, that which is first in `_BEFORE`."""
        for each in tensors:
            if each.layout is not torch.strided:  # a sparse gradient, whose values were noted as they were made
                continue
            number = self._note(_storage(each))
            self._kinds[number] = min(kind, self._kinds.get(number, kind), key=_BEFORE.index)
            if on_host:
                self._on_host.add(number)

    def seen(self, operation: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Do an operation, and note what it made and sent."""
        if operation.namespace in _NAMESPACES:
            return self._communicated(operation, inputs, options)
        given = operation(*inputs, **options)
        self._note_all(given)
        return given

    def _communicated(self, operation: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        name = operation.name().partition("::")[2].partition(".")[0]
        if name == "wait_tensor":  # without values it would give a copy, which it does not with some
            return inputs[0]
        given = operation(*inputs, **options)
        self._note_all(given)
        if name in _COLLECTIVES:
            collective, at, is_part = _COLLECTIVES[name]
            names = [found for each in inputs if (found := group_name(each)) in self._groups]
            dimension, size = self._groups[names[-1] or ""] if names else ("all", 0)
            size_of_all = sum(each.nbytes for each in _tensors(inputs[at])) * (size if is_part else 1)
            counted = self._traffic.setdefault((collective, dimension, size), [0, 0])
            counted[0] += 1
            counted[1] += size_of_all
            if operation.namespace == "c10d":  # those of DTensors give what the model goes on with
                self.hold("communication", _tensors(inputs))
        return given

    def forget_traffic(self) -> None:
        """Count messages from here on."""
        self._traffic.clear()

    def traffic(self) -> tuple[Traffic, ...]:
        """What was sent, by collective and dimension."""
        return tuple(Traffic(*key, *counted) for key, counted in sorted(self._traffic.items()))

    def memory(self) -> tuple[MemoryUse, MemoryUse, str, int]:
        """Each kind at its most, all at the peak, the phase of that, and the most bytes on the host."""
        now, most, peak, moment = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0), "forward"
        total = highest = host = most_on_host = 0
        for number, more, phase in self._changes:
            if number in self._on_host:
                host += more
                most_on_host = max(host, most_on_host)
                continue
            kind = self._kinds.get(number, "activations")
            now[kind] += more
            total += more
            if more > 0:
                most[kind] = max(now[kind], most[kind])
                if total > highest:
                    highest, peak, moment = total, dict(now), phase
        return MemoryUse(**most), MemoryUse(**peak), moment, most_on_host

    def _note_all(self, given: Any) -> None:
        for each in _tensors(given):
            if is_made_by(self._mode, each):
                self._note(each.untyped_storage())

    def _note(self, storage: torch.UntypedStorage) -> int:
        number = self._numbers.get(storage)
        if number is None:
            number = self._numbers[storage] = len(self._references)
            self._references[number] = weakref.ref(storage, partial(self._freed, number))
            self._sizes[number] = 0
            self._resized_to(number, storage.nbytes())
        return int(number)

    def _freed(self, number: int, _: object) -> None:
        self._resized_to(number, 0)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        number = self._numbers.get(storage)
        if number is not None:
            self._kinds.setdefault(number, "communication")
            self._resized_to(number, storage.nbytes())

    def _resized_to(self, number: int, size: int) -> None:
        if size != self._sizes[number]:
            self._changes.append((number, size - self._sizes[number], self.phase))
            self._sizes[number] = size


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if is_dtensor(tensor) else tensor).untyped_storage()


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in what an operation takes or gives."""
    if isinstance(value, torch.Tensor):
        return [value] if value.layout is torch.strided else []
    return [each for item in value for each in _tensors(item)] if isinstance(value, list | tuple) else []
