"""DDP that notices when the model it wraps has changed, and wraps it again in place.

DDP decides once, when it is made, which parameters it reduces: those that require gradients then. One that is unfrozen,
added or replaced later is trained by each rank on its own, silently, and so is one that was moved to another device and
back. One that is frozen later, or cast, breaks a pass further on.

Contract: `wrap_module` makes a `Replica` wherever there are peers. `changes` compares what is reduced with what
requires gradients now, in words that are the same on ranks whose models changed alike. `rewrap` follows the change; it
is a collective, and keeps the object with its hooks, its communication hooks, its options and all gradients. The engine
does both where ranks agree, at an epoch's start. In between, a forward pass that is to reduce raises
`ModelChangedError` before anything has been trained by one rank alone.

A module whose parameters are all frozen is left alone, because nothing of it is reduced: that is how a GAN's step takes
gradients through its discriminator. Frozen parameters are no change either where DDP looks for unused ones.

`backward_passes` counts those that reduced. Ranks whose counts differ have come apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from allstep.errors import ModelChangedError, ParallelError
from allstep.parallel.buckets import fix_buckets
from allstep.parallel.torch_private import can_queue_callbacks, not_compiled, queue_backward_callback
from allstep.protocol.heartbeat import RankActivity

_requires_grad = attrgetter("requires_grad")
_REMEDY = (
    "Call world.rewrap(model) on every rank right behind the change. An Engine does that itself for a change that is "
    "made between epochs, in a handler of EPOCH_COMPLETED or EPOCH_STARTED"
)


class Replica(DistributedDataParallel):
    """DDP around a module that may change; see above. `activity` is told of backward passes, where there is one."""

    activity: RankActivity | None = None

    def __init__(
        self, module: nn.Module, *, deterministic: bool = False, sync_batchnorm: bool = False, **options: Any
    ) -> None:
        self.communication_hooks: list[tuple[object, Callable[..., Any]]] = []  # DDP may register one as it is made
        super().__init__(module, **options)
        self.given = {"deterministic": deterministic, "sync_batchnorm": sync_batchnorm, **options}
        self.backward_passes = 0
        self._in_backward = False
        self._counts_passes = can_queue_callbacks()
        self._note_parameters()
        if deterministic:
            fix_buckets(self)

    def _note_parameters(self) -> None:
        """What is reduced from now on."""
        self._known = _parameters(self)
        self._tensors = list(self._known.values())  # also keeps them alive, so that no other takes an address
        self._required = list(map(_requires_grad, self._tensors))
        self._trained = [each for each in self._tensors if each.requires_grad]
        self._frozen = [each for each in self._tensors if not each.requires_grad]
        self._described = [(each.dtype, each.device, each.shape) for each in self._tensors]
        # DDP's hooks are on the nodes that gather gradients. One that is moved or cast, and back, has another node.
        self._nodes = [get_gradient_edge(each).node if each.requires_grad else None for each in self._tensors]

    # Noticing

    def changes(self) -> list[str]:
        """What has changed in the parameters that are reduced, a clause for each; empty where nothing has."""
        now = _parameters(self)
        if not any(map(_requires_grad, now.values())):
            return []
        at = {id(each): place for place, each in enumerate(self._tensors)}
        # Where DDP looks for parameters that got no gradient, a frozen one is one of those.
        tolerates_unused = self.find_unused_parameters and not self.static_graph
        found = []
        for name, parameter in now.items():
            place = at.pop(id(parameter), None)
            needs = parameter.requires_grad
            if place is None:
                if needs:
                    found.append(f"{name} is {'another tensor' if name in self._known else 'new'}")
                continue
            described = parameter.dtype, parameter.device, parameter.shape
            if needs and not self._required[place]:
                found.append(f"{name} requires gradients now")
            elif not needs and self._required[place] and not tolerates_unused:
                found.append(f"{name} is frozen now")
            if needs and described != self._described[place]:
                found.append(f"{name} was {_said(self._described[place])} and is {_said(described)}")
            elif needs and self._required[place] and get_gradient_edge(parameter).node is not self._nodes[place]:
                found.append(f"{name} was moved or cast, and back")
        names = list(self._known)
        gone = [names[place] for place in at.values() if self._required[place] and names[place] not in now]
        return found + [f"{name} is gone" for name in gone if not tolerates_unused]

    def has_new_flags(self) -> bool:
        """Whether `requires_grad` of a known parameter is not what it was: the quick part of `changes`."""
        # Every forward pass asks this: about 20 ns a parameter.
        return not all(map(_requires_grad, self._trained)) or any(map(_requires_grad, self._frozen))

    @not_compiled
    def _check_unchanged(self) -> None:
        if self.has_new_flags() and (changes := self.changes()):
            raise ModelChangedError(
                f"the model has changed since it was wrapped, and its gradients would not be reduced over ranks: "
                f"{in_short(changes)}. {_REMEDY}"
            )

    # Following

    def rewrap(self) -> None:
        """Reduce what requires gradients now. Collective; the parameters and buffers become those of rank 0.

        Raises:
            ParallelError: DDP cannot wrap the module as it is now; the replica is as it was.
        """
        if self.mixed_precision is not None:
            raise ParallelError(
                "a model in DDP with mixed_precision= cannot be wrapped again, since DDP has left hooks in it; change "
                "it before world.wrap, or use torch.autocast for mixed precision"
            )
        before = dict(self.__dict__)
        hooks, passes, self.activity = self.communication_hooks, self.backward_passes, None
        try:
            if self.given["sync_batchnorm"]:
                _convert_new_batchnorms(self.module)
            # The public constructor, on this very object: whoever holds it goes on with the new reducer.
            type(self).__init__(self, self.module, **self.given)
        except Exception as error:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise ParallelError(f"the changed model cannot be wrapped in DDP again: {error}") from error
        # What any module has, such as hooks and its mode, is as it was; torch's constructor has emptied it.
        kept = {*vars(nn.Module()), "activity", "require_backward_grad_sync", "require_forward_param_sync"}
        self.__dict__.update({name: before[name] for name in kept if name in before})
        self.backward_passes = passes
        for state, hook in hooks:
            self.register_comm_hook(state, hook)

    def register_comm_hook(self, state: object, hook: Callable[..., Any]) -> None:
        """As in DDP; it stays when the module is wrapped again."""
        super().register_comm_hook(state, hook)
        self.communication_hooks.append((state, hook))

    # Forward and backward passes

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As in DDP."""
        reduces = torch.is_grad_enabled() and self.require_backward_grad_sync
        if reduces:
            self._check_unchanged()
        output = super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]
        if reduces and self._counts_passes:
            _watch_backward(output, self)
        return output

    def backward_begins(self) -> None:
        """A backward pass that reduces has come to this module's outputs."""
        if not self._in_backward:
            self._in_backward = True
            self.backward_passes += 1
            if self.activity is not None:
                self.activity.backward_begins(id(self))

    def gradients_are_there(self) -> None:
        """This rank has all gradients of the backward pass."""
        self._in_backward = False

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        # A copy tells nobody, is in torch's default group, and notes its own parameters.
        for name in ("activity", "_known", "_tensors", "_required", "_trained", "_frozen", "_described", "_nodes"):
            state.pop(name, None)
        state["given"] = {name: each for name, each in self.given.items() if name != "process_group"}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._note_parameters()


def in_short(changes: list[str]) -> str:
    """Changes as one clause, of which the first few are named."""
    more = len(changes) - 5
    return "; ".join(changes[:5]) + (f"; and {more} more" if more > 0 else "")


def _parameters(ddp: DistributedDataParallel) -> dict[str, nn.Parameter]:
    ignored = ddp.parameters_to_ignore
    return {name: each for name, each in ddp.module.named_parameters() if name not in ignored}


def _said(described: tuple[torch.dtype, torch.device, torch.Size]) -> str:
    dtype, device, shape = described
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device.type}"


def _convert_new_batchnorms(module: nn.Module) -> None:
    batchnorm = nn.modules.batchnorm
    if any(
        isinstance(each, batchnorm.BatchNorm1d | batchnorm.BatchNorm2d | batchnorm.BatchNorm3d)
        for each in module.modules()
        if each is not module
    ):
        nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]


@not_compiled
def _watch_backward(output: Any, replica: Replica) -> None:
    """Tell `replica` of the backward passes through `output`."""
    replica._in_backward = False  # also where the last backward pass raised
    if replica.activity is not None:
        replica.activity.forward_ends(id(replica))
    hook = _backward_hook(replica)
    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(hook)  # type: ignore[no-untyped-call]


def _backward_hook(replica: Replica) -> Callable[[torch.Tensor], None]:
    """The hook for all outputs of one forward pass; it acts once in a backward pass."""
    has_begun = False

    def backward_began(gradient: torch.Tensor) -> None:
        nonlocal has_begun
        if not has_begun:
            has_begun = True
            queue_backward_callback(gradients_are_there)
            replica.backward_begins()

    def gradients_are_there() -> None:
        nonlocal has_begun
        has_begun = False  # the graph may be kept for another backward pass
        replica.gradients_are_there()

    return backward_began


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors(list(vars(value).values()))
