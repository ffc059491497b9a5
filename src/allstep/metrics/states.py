"""Which states there are, how each is reduced, and in which order they are packed.

Contract: `make_plan` is called on each rank for itself, with the metrics of one event; ranks whose plans have equal
`schema` lines lay their states out alike. States that are reduced element by element (sum, max, min) are laid in
blocks, one for each operation and element type, so that a block is reduced at once. All others travel as a list of
tensors: those of list states, and a tensor state whose reduction must see what each rank had ("mean", None, a function
of the user's). A plan holds for as long as `is_current` says, since an update may change a state's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum

from allstep.coordination import ReduceOp, fingerprint
from allstep.errors import MetricError
from allstep.metrics.describe import Schema, StateLine
from allstep.metrics.nodes import MetricNode

Form: TypeAlias = tuple[torch.Size, torch.dtype] | None

_OPS: dict[Any, ReduceOp] = {dim_zero_sum: "sum", dim_zero_max: "max", dim_zero_min: "min"}
_NAMES: dict[Any, str] = {dim_zero_mean: "mean", dim_zero_cat: "cat", **_OPS, None: "None"}

ALIGNMENT = 16  # of each tensor in a payload, in bytes, for any element type

_BYTES_BESIDE = 64  # that go with a state or metric: its manifest, and what rounding up adds


@dataclass(frozen=True, slots=True, eq=False)
class ElementwiseState:
    """A tensor that is reduced element by element. `node` is its metric's index in the plan."""

    node: int
    name: str
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class GatheredState:
    """A state of which each rank gives a list of tensors.

    Attributes:
        node: its metric's index in the plan.
        name: the state's.
        is_list: whether it is a list; else a tensor, which each rank gives as a list of one.
        reduction: from all ranks' tensors to one value; None leaves them as they are.
        form: the shape and type of a tensor when the plan was made; None for lists.
    """

    node: int
    name: str
    is_list: bool
    reduction: Callable[[Any], Any] | None
    form: Form = None

    @property
    def concatenates(self) -> bool:
        """Whether its tensors are concatenated."""
        return self.reduction is dim_zero_cat


@dataclass(frozen=True, slots=True, eq=False)
class StateBlock:
    """Elementwise states of one operation and element type, side by side.

    Attributes:
        op: the operation.
        dtype: the element type.
        states: in the order in which they lie.
        lengths: of each state, in elements.
        at: where in the payload the block begins, in bytes.
        size: bytes of the block.
    """

    op: ReduceOp
    dtype: torch.dtype
    states: tuple[ElementwiseState, ...]
    lengths: list[int]
    at: int
    size: int

    def parts(self, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """Each state's part of the block's values, flat (n,), in the shape of the state; views."""
        shape = self.states[0].shape
        if all(state.shape == shape for state in self.states):  # as those of most classes are: one view of all
            return values.view(len(self.states), *shape).unbind()
        parts = torch.split(values, self.lengths)
        return [part.view(state.shape) for state, part in zip(self.states, parts, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class ReductionPlan:
    """All states of an event's metrics.

    Attributes:
        nodes: metrics whose states are packed.
        blocks: the elementwise states.
        block_bytes: of all blocks, which come first in a payload.
        gathered: all others.
        sharing: metrics whose states another one holds too, each with that one's index in `nodes`.
        device: where the payload is packed: the accelerator, if any state is on one.
        schema: one line a state, then what else ranks compare; ranks with equal ones pack alike.
        fingerprint: of the schema.
    """

    nodes: tuple[MetricNode, ...]
    blocks: tuple[StateBlock, ...]
    block_bytes: int
    gathered: tuple[GatheredState, ...]
    sharing: tuple[tuple[MetricNode, int], ...]
    device: torch.device
    schema: Schema
    fingerprint: int

    def value(self, state: ElementwiseState | GatheredState) -> Any:
        """What this rank holds of a state."""
        return getattr(self.nodes[state.node].metric, state.name)

    def is_current(self) -> bool:
        """Whether tensors still have the types and shapes that the plan was made for."""
        for block in self.blocks:
            for state in block.states:
                value = self.value(state)
                # A tensor of the right kind is the usual case, and this runs at every event.
                if not isinstance(value, torch.Tensor) or value.shape != state.shape or value.dtype != state.dtype:
                    return False
        return all(form_of(self.value(state)) == state.form for state in self.gathered if not state.is_list)

    def check_tensors(self) -> None:
        """Raise MetricError where an update has put something else in the place of a tensor.

        Where ranks differ in that, their schemas do.
        """
        for state in self.gathered:
            node, value = self.nodes[state.node], self.value(state)
            if not state.is_list and not isinstance(value, torch.Tensor):
                raise MetricError(
                    f"metric {node.name!r} ({type(node.metric).__name__}), state {state.name!r}, was declared as a "
                    f"tensor, and its update made {_kind(value)} of it. Keep it a tensor, as `self.{state.name} += 1` "
                    "does"
                )


def make_plan(
    event: str, nodes: Iterable[MetricNode], leaders: Mapping[int, Metric], further: Sequence[StateLine] = ()
) -> ReductionPlan:
    """The plan for metrics that are reduced together at `event`.

    Args:
        event: its name, for errors.
        nodes: all metrics with states.
        leaders: for those whose states another one holds too, that one, by id.
        further: lines for ranks to compare beside those of the states.
    """
    packed, sharing = _divided(nodes, leaders)
    blocks: dict[tuple[ReduceOp, torch.dtype], list[ElementwiseState]] = {}
    gathered: list[GatheredState] = []
    for place, node in enumerate(packed):
        for name, default in node.defaults.items():
            value, op = getattr(node.metric, name), elementwise_op(node.reductions[name])
            # By the default too: an update may have replaced the tensor, which `check_tensors` tells.
            if isinstance(default, torch.Tensor) and isinstance(value, torch.Tensor) and op is not None:
                state = ElementwiseState(place, name, value.shape, value.dtype)
                blocks.setdefault((op, value.dtype), []).append(state)
            else:
                is_list = isinstance(default, list)
                gathered.append(GatheredState(place, name, is_list, node.reductions[name], form_of(value)))
    schema = (*_lines(event, packed, sharing, as_made=False), *further)
    laid_out, block_bytes = _laid_out(blocks)
    return ReductionPlan(
        tuple(packed),
        laid_out,
        block_bytes,
        tuple(gathered),
        tuple(sharing),
        _device_of(packed),
        schema,
        fingerprint(schema),
    )


def _laid_out(
    blocks: Mapping[tuple[ReduceOp, torch.dtype], Sequence[ElementwiseState]],
) -> tuple[tuple[StateBlock, ...], int]:
    """The blocks one behind the other, and how many bytes they take."""
    found: list[StateBlock] = []
    at = 0
    for (op, dtype), states in blocks.items():
        lengths = [state.shape.numel() for state in states]
        size = sum(lengths) * dtype.itemsize
        found.append(StateBlock(op, dtype, tuple(states), lengths, at, size))
        at += padded(size)
    return tuple(found), at


def padded(size: int) -> int:
    """A size in bytes, rounded up so that what follows is aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def schema_as_made(
    event: str, nodes: Iterable[MetricNode], leaders: Mapping[int, Metric], further: Sequence[StateLine] = ()
) -> Schema:
    """The schema of these metrics before any took a batch in, whatever shapes their states have by now."""
    return (*_lines(event, *_divided(nodes, leaders), as_made=True), *further)


def bytes_as_made(nodes: Iterable[MetricNode], leaders: Mapping[int, Metric]) -> int:
    """At most how many bytes the tensor states of these metrics take before any took a batch in, on all ranks alike."""
    packed, _ = _divided(nodes, leaders)
    # From the defaults: what ranks hold may have grown differently, and frames must not differ.
    values = [default for node in packed for default in node.defaults.values()]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum(value.numel() * value.itemsize for value in tensors) + _BYTES_BESIDE * (len(values) + len(packed))


def form_of(value: Any) -> Form:
    """The shape and type of a tensor; None for anything else."""
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else None


def elementwise_op(reduction: Any) -> ReduceOp | None:
    """The operation of a reduction that works element by element, None for any other."""
    return _OPS.get(reduction)


def reduction_name(reduction: Any) -> str:
    """What a state's reduction is called where ranks compare, and in errors."""
    return _NAMES.get(reduction) or f"reduced by {getattr(reduction, '__name__', type(reduction).__name__)}"


Sharing: TypeAlias = list[tuple[MetricNode, int]]


def _divided(nodes: Iterable[MetricNode], leaders: Mapping[int, Metric]) -> tuple[list[MetricNode], Sharing]:
    """Metrics whose states are packed, and those that share the states of one of them, with its place."""
    every = list(nodes)
    # The order is that of the entries, which is the same on ranks that attached the same.
    packed = [node for node in every if id(node.metric) not in leaders]
    places = {id(node.metric): place for place, node in enumerate(packed)}
    sharing = [(node, places[id(leaders[id(node.metric)])]) for node in every if id(node.metric) in leaders]
    return packed, sharing


def _device_of(nodes: Iterable[MetricNode]) -> torch.device:
    devices = [torch.device(node.metric.device) for node in nodes]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _lines(event: str, packed: Sequence[MetricNode], sharing: Sharing, *, as_made: bool) -> list[StateLine]:
    lines = []
    for node in packed:
        for name, default in node.defaults.items():
            value = default if as_made else getattr(node.metric, name)
            lines.append(StateLine(event, _named(node), name, _form_text(default, value, node.reductions[name])))
    shared = [StateLine(event, _named(node), "", f"with the states of {_named(packed[at])}") for node, at in sharing]
    return [*lines, *shared]


def _named(node: MetricNode) -> str:
    return f"{node.name} ({type(node.metric).__name__})"


def _form_text(default: Any, value: Any, reduction: Any) -> str:
    how = reduction_name(reduction)
    if isinstance(default, list):
        return f"a list, {how}"
    if not isinstance(value, torch.Tensor):
        return f"{_kind(value)} in the place of a tensor, {how}"
    return f"a tensor, {how}, {str(value.dtype).removeprefix('torch.')}, shape {tuple(value.shape)}"


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
