"""Which states there are, how each is reduced, and in which order they are packed.

Contract: made from the metrics of one event, on each rank for itself; ranks whose plans have equal `schema` lines lay
their states out alike. States that add up element by element (sum, max, min) are laid in blocks, one for each operation
and element type, so that a block is reduced at once. All others travel as a list of tensors: those of list states, and
a tensor state whose reduction must see what each rank had ("mean", None, a function of the user's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum

from allstep.coordination import ReduceOp, Schema, StateLine, fingerprint
from allstep.errors import MetricError
from allstep.metrics.nodes import Node
from allstep.metrics.torchmetrics_private import syncs_itself

Reduction = Callable[[Any], Any] | None
Form: TypeAlias = tuple[torch.Size, torch.dtype] | None

_OPS: dict[Any, ReduceOp] = {dim_zero_sum: "sum", dim_zero_max: "max", dim_zero_min: "min"}
_NAMES: dict[Any, str] = {dim_zero_mean: "mean", dim_zero_cat: "cat", **_OPS, None: "None"}


_SURROUNDING = 64  # bytes that go with a state or metric: its manifest, and what rounding up adds


@dataclass(frozen=True, slots=True, eq=False)
class FixedState:
    """A tensor that is reduced element by element. `node` is its metric's index in the plan."""

    node: int
    name: str
    shape: torch.Size
    dtype: torch.dtype

    def value(self, node: Node) -> torch.Tensor:
        """What this rank has."""
        found: torch.Tensor = getattr(node.metric, self.name)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class ListedState:
    """A state that travels as a list of tensors. `is_list` says that it is one, else a tensor that each rank gives.

    `form` is the shape and type of such a tensor when the plan was made.
    """

    node: int
    name: str
    is_list: bool
    reduction: Reduction
    form: Form = None

    @property
    def concatenates(self) -> bool:
        """Whether its tensors are concatenated."""
        return self.reduction is dim_zero_cat


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Fixed states of one operation and element type, side by side."""

    op: ReduceOp
    dtype: torch.dtype
    states: tuple[FixedState, ...]

    @property
    def length(self) -> int:
        """Elements in all of them."""
        return sum(state.shape.numel() for state in self.states)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All states of an event's metrics.

    Attributes:
        nodes: metrics whose states are packed.
        blocks: the fixed states.
        listed: all others.
        alone: metrics that reduce their states in a way of their own.
        followers: for metrics whose states another one holds too, the index of that one in `nodes`.
        schema: one line a state, then what else ranks compare; ranks with equal ones pack alike.
    """

    nodes: tuple[Node, ...]
    blocks: tuple[Block, ...]
    listed: tuple[ListedState, ...]
    alone: tuple[Node, ...]
    followers: tuple[tuple[Node, int], ...]
    schema: Schema
    fingerprint: int

    def is_current(self) -> bool:
        """Whether tensors still have the types and shapes that the plan was made for."""
        fixed = all(
            form_of(state.value(self.nodes[state.node])) == (state.shape, state.dtype)
            for block in self.blocks
            for state in block.states
        )
        return fixed and all(
            form_of(getattr(self.nodes[state.node].metric, state.name)) == state.form
            for state in self.listed
            if not state.is_list
        )

    def check_tensors(self) -> None:
        """Raise MetricError where an update has put something else in the place of a tensor.

        Where ranks differ in that, their schemas do.
        """
        for state in self.listed:
            node = self.nodes[state.node]
            value = getattr(node.metric, state.name)
            if not state.is_list and not isinstance(value, torch.Tensor):
                raise MetricError(
                    f"metric {node.name!r} ({type(node.metric).__name__}), state {state.name!r}, was declared as a "
                    f"tensor, and its update made {_kind(value)} of it. Keep it a tensor, as `self.{state.name} += 1` "
                    "does"
                )

    @property
    def device(self) -> torch.device:
        """Where the states are: the accelerator, if any of them is on one."""
        devices = [torch.device(node.metric.device) for node in self.nodes]
        return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def make_plan(
    event: str, found: Iterable[Node], following: Mapping[int, Metric], further: Sequence[StateLine] = ()
) -> Plan:
    """The plan for metrics that are reduced together at `event`.

    Args:
        event: its name, for errors.
        found: all metrics with states.
        following: those of them whose states another one holds too, and that one, by id.
        further: lines for ranks to compare beside those of the states.
    """
    leading, alone, behind = _divided(found, following)
    fixed: dict[tuple[ReduceOp, torch.dtype], list[FixedState]] = {}
    listed: list[ListedState] = []
    for place, node in enumerate(leading):
        for name, default in node.metric._defaults.items():
            reduction: Any = node.metric._reductions[name]
            value = getattr(node.metric, name)
            op = _OPS.get(reduction)
            if isinstance(default, torch.Tensor) and isinstance(value, torch.Tensor) and op is not None:
                state = FixedState(place, name, value.shape, value.dtype)
                fixed.setdefault((op, value.dtype), []).append(state)
            else:
                listed.append(ListedState(place, name, isinstance(default, list), reduction, form_of(value)))
    schema = (*_lines(event, leading, alone, behind, as_made=False), *further)
    return Plan(
        tuple(leading),
        tuple(Block(op, dtype, tuple(states)) for (op, dtype), states in fixed.items()),
        tuple(listed),
        tuple(alone),
        tuple(behind),
        schema,
        fingerprint(schema),
    )


def schema_as_made(
    event: str, found: Iterable[Node], following: Mapping[int, Metric], further: Sequence[StateLine] = ()
) -> Schema:
    """The schema of these metrics before any took a batch in, whatever shapes their states have by now."""
    return (*_lines(event, *_divided(found, following), as_made=True), *further)


def bytes_as_made(found: Iterable[Node], following: Mapping[int, Metric]) -> int:
    """At most how many bytes the tensor states of these metrics take before any took a batch in, on all ranks alike."""
    leading, _, _ = _divided(found, following)
    values = [default for node in leading for default in node.metric._defaults.values()]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum(value.numel() * value.itemsize for value in tensors) + _SURROUNDING * (len(values) + len(leading))


def form_of(value: Any) -> Form:
    """The shape and type of a tensor; None for anything else."""
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else None


def element_wise(reduction: Any) -> ReduceOp | None:
    """The operation of a reduction that adds up element by element, None for any other."""
    return _OPS.get(reduction)


def describe(reduction: Any) -> str:
    """What a state's reduction is called where ranks compare, and in errors."""
    return _NAMES.get(reduction) or f"reduced by {getattr(reduction, '__name__', type(reduction).__name__)}"


Behind: TypeAlias = list[tuple[Node, int]]


def _divided(found: Iterable[Node], following: Mapping[int, Metric]) -> tuple[list[Node], list[Node], Behind]:
    """Metrics whose states are packed, those with a way of their own, and those behind the first with its place."""
    every = list(found)
    alone = [node for node in every if syncs_itself(node.metric)]
    leading = [node for node in every if not syncs_itself(node.metric) and id(node.metric) not in following]
    places = {id(node.metric): place for place, node in enumerate(leading)}
    behind = [(node, places[id(following[id(node.metric)])]) for node in every if id(node.metric) in following]
    return leading, alone, behind


def _lines(
    event: str, leading: Sequence[Node], alone: Sequence[Node], behind: Behind, *, as_made: bool
) -> list[StateLine]:
    return [
        *(
            StateLine(
                event,
                _named(node),
                name,
                _form(default, default if as_made else getattr(node.metric, name), node.metric._reductions[name]),
            )
            for node in leading
            for name, default in node.metric._defaults.items()
        ),
        *(StateLine(event, _named(node), "", "reduced in a way of its own") for node in alone),
        *(StateLine(event, _named(node), "", f"with the states of {_named(leading[at])}") for node, at in behind),
    ]


def _named(node: Node) -> str:
    return f"{node.name} ({type(node.metric).__name__})"


def _form(default: Any, value: Any, reduction: Any) -> str:
    how = describe(reduction)
    if isinstance(default, list):
        return f"a list, {how}"
    if not isinstance(value, torch.Tensor):
        return f"{_kind(value)} in the place of a tensor, {how}"
    return f"a tensor, {how}, {str(value.dtype).removeprefix('torch.')}, shape {tuple(value.shape)}"


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
