"""Tensor parallelism: a plan that says how submodules are divided over the ranks that compute one batch together.

Contract: `wrap_module` calls `divide_module` in a mesh with a `tensor` dimension, before the module is sharded over
data ranks. Before: every rank has built the same module and calls this at the same point. After: the submodules that
the plan names hold DTensors over `tensor`, with the values that rank 0 had, and what is left is whole on each rank. A
forward pass then gives what the whole module would, and the gradients of what is whole are the same on all ranks of
`tensor`. Where nobody shards it afterwards, gradients that DTensor leaves partial are reduced as they come.

A plan maps names of submodules, in which `*` stands for any part between dots, to torch's parallel styles or to their
names in `STYLES`. It is what `wrap` is given, else what the model offers: an attribute or a method `tensor_plan`, or
the `tp_plan` of Hugging Face's models. All that can be known to go wrong is checked before anything is changed: names
that are not there, sizes that do not divide, tied weights that would come apart.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from allstep.errors import ArgumentError, ParallelError
from allstep.parallel.buffers import broadcast_from_first
from allstep.parallel.dtensor import is_dtensor
from allstep.suggestions import did_you_mean

log = logging.getLogger("allstep.parallel")

TensorPlan = Mapping[str, ParallelStyle | str]
"""Names of submodules, or patterns of them, and how each is divided."""

STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "sequence_parallel": SequenceParallel,
}
"""Styles by name; those with `rep` are Hugging Face's names of the ones before them."""

# The dimension of each parameter that a style divides, and the attribute that is its size.
_DIVIDED: dict[tuple[type[ParallelStyle], type[nn.Module]], tuple[dict[str, int], str]] = {
    (ColwiseParallel, nn.Linear): ({"weight": 0, "bias": 0}, "out_features"),
    (RowwiseParallel, nn.Linear): ({"weight": 1}, "in_features"),
    (ColwiseParallel, nn.Embedding): ({"weight": 1}, "embedding_dim"),
    (RowwiseParallel, nn.Embedding): ({"weight": 0}, "num_embeddings"),
}


def offered_plan(module: nn.Module) -> Mapping[str, Any] | None:
    """The plan that a model's class has for it; None where it has none."""
    for name in ("tensor_plan", "tp_plan"):
        offered = getattr(module, name, None)
        plan = offered() if callable(offered) and not isinstance(offered, nn.Module) else offered
        if isinstance(plan, Mapping) and plan:
            return plan
    return None


def styles_of(module: nn.Module, plan: TensorPlan | None, size: int = 1) -> dict[str, ParallelStyle]:
    """Which submodules are divided and how, by their names; empty where nothing is.

    Args:
        module: whose submodules the plan names.
        plan: what was asked for; None for what the module offers.
        size: ranks of the mesh's `tensor` dimension.

    Raises:
        ArgumentError: the plan is no mapping of names to styles.
        ParallelError: it names what the module does not have, twice, or what cannot be divided by `size`.
    """
    is_offered = plan is None
    asked: Any = offered_plan(module) or {} if plan is None else plan
    if not isinstance(asked, Mapping):
        raise ArgumentError(
            f"tensor_plan is {asked!r}; give a dict of submodules' names and styles, such as "
            '{"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}'
        )
    found: dict[str, ParallelStyle] = {}
    owners: dict[nn.Module, str] = {}
    for pattern, said in asked.items():
        style = _style(pattern, said)
        names = _matches(module, pattern)
        if not names and is_offered:
            # A class's plan covers all its variants, of which this model is one.
            log.info("the tensor plan of %s names %s, which this model does not have", type(module).__name__, pattern)
        elif not names:
            raise ParallelError(f"tensor_plan names {pattern!r}, {_no_such_name(module, pattern)}")
        for name in names:
            each = module.get_submodule(name)
            if owners.get(each) == pattern:  # one that is used in several places
                continue
            if each in owners:
                raise ParallelError(
                    f"tensor_plan names {name or 'the module'} by {pattern!r} and by {owners[each]!r}; name it once"
                )
            owners[each], found[name] = pattern, style
            _check_divides(name, each, style, size)
    _check_ties(module, found)
    return found


def _style(pattern: object, said: object) -> ParallelStyle:
    if not isinstance(pattern, str):
        raise ArgumentError(f"tensor_plan has the key {pattern!r}; keys are names of submodules")
    if isinstance(said, str):
        if said not in STYLES:
            raise ArgumentError(
                f"tensor_plan has {pattern}={said!r}{did_you_mean(said, STYLES)}; the styles with names are "
                f"{', '.join(STYLES)}, and others are given as objects of torch.distributed.tensor.parallel"
            )
        return STYLES[said]()
    if not isinstance(said, ParallelStyle):
        raise ArgumentError(
            f"tensor_plan has {pattern}={said!r}; give a style of torch.distributed.tensor.parallel, or one of "
            f"{', '.join(STYLES)}"
        )
    return said


def _matches(module: nn.Module, pattern: str) -> list[str]:
    parts = pattern.split(".")
    return [
        name
        for name, _ in module.named_modules(remove_duplicate=False)
        if len(own := name.split(".")) == len(parts) and all(map(fnmatchcase, own, parts))
    ]


def _no_such_name(module: nn.Module, pattern: str) -> str:
    """What is wrong with a name: the part of it that does not fit, and what there is instead."""
    parts = pattern.split(".")
    fits = next(
        length for length in range(len(parts) - 1, -1, -1) if not length or _matches(module, _head(parts, length))
    )
    outer = [module] if not fits else [module.get_submodule(name) for name in _matches(module, _head(parts, fits))]
    there = dict.fromkeys(name for each in outer for name, _ in each.named_children())
    known = {re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name, _ in module.named_modules() if name}
    within = f" within {_head(parts, fits)!r}" if fits else ""
    shown = ", ".join([*there][:8]) + (", ..." if len(there) > 8 else "")
    return f"but there is no {parts[fits]!r}{within}, only {shown or 'no submodule'}{did_you_mean(pattern, known)}"


def _head(parts: list[str], length: int) -> str:
    return ".".join(parts[:length])


def _dims(style: ParallelStyle, module: nn.Module) -> tuple[dict[str, int], str] | None:
    """Which dimension of each parameter is divided and the name of its size; None for what is not known here."""
    for (of, kind), dims in _DIVIDED.items():
        if isinstance(style, of) and isinstance(module, kind):
            return dims
    return None


def _check_divides(name: str, module: nn.Module, style: ParallelStyle, size: int) -> None:
    known = _dims(style, module)
    if known is None:
        if isinstance(style, ColwiseParallel | RowwiseParallel):
            raise ParallelError(
                f"tensor_plan has {type(style).__name__} for {name or 'the module'} ({type(module).__name__}), but it "
                "divides nn.Linear and nn.Embedding alone; name what is inside of it, or use another style"
            )
        return
    if (length := getattr(module, known[1])) % size:
        raise ParallelError(
            f"tensor_plan divides {name or 'the module'} ({type(module).__name__}) over tensor={size}, but its "
            f"{known[1]} is {length}, which {size} does not divide. Change that size, have another tensor size in the "
            "mesh, or leave the submodule out of the plan"
        )


def _check_ties(module: nn.Module, styles: Mapping[str, ParallelStyle]) -> None:
    """Raise where the holders of one tied weight would be divided in different ways."""
    for holders in _ties(module):
        ways: dict[object, str] = {}
        for name, key in holders:
            style = styles.get(name)
            known = None if style is None else _dims(style, module.get_submodule(name))
            way = "whole" if style is None else type(style) if known is None else known[0].get(key, "whole")
            ways.setdefault(way, f"{name}.{key}" if name else key)
        if len(ways) > 1:
            first, second = list(ways.values())[:2]
            raise ParallelError(
                f"{first} and {second} are one tied weight, which tensor_plan divides in different ways. Divide both "
                'along the same dimension, such as an embedding by "rowwise" and the head by "colwise", or neither'
            )


def _ties(module: nn.Module) -> list[list[tuple[str, str]]]:
    """The holders of each parameter that several submodules hold: their names and the parameter's name in each."""
    holders: dict[nn.Parameter, list[tuple[str, str]]] = {}
    for name, each in module.named_modules():
        for key, parameter in each.named_parameters(recurse=False):
            holders.setdefault(parameter, []).append((name, key))
    return [of for of in holders.values() if len(of) > 1]


@contextmanager
def keeping_ties(module: nn.Module) -> Iterator[None]:
    """Have submodules that hold one parameter hold one afterwards, whatever replaces it."""
    ties = [[(module.get_submodule(name), key) for name, key in holders] for holders in _ties(module)]
    yield
    for holders in ties:
        first, key = holders[0]
        for other, name in holders[1:]:
            setattr(other, name, getattr(first, key))


def divide_module(
    module: nn.Module, styles: Mapping[str, ParallelStyle], mesh: DeviceMesh, device: torch.device
) -> None:
    """Divide submodules over the ranks of a mesh, in place. Collective.

    Args:
        module: on any device, or on "meta".
        styles: of its submodules; see `styles_of`.
        mesh: of one dimension.
        device: this rank's.
    """
    with keeping_ties(module):
        for name, style in styles.items():
            each = module.get_submodule(name)
            whole = [one for one in each.parameters() if not (one.is_meta or is_dtensor(one))]
            for one in whole:  # no more than one submodule is on the device whole
                one.data = one.data.to(device)
            broadcast_from_first(whole)
            parallelize_module(each, mesh, style, src_data_rank=None)


def reduce_partial_gradients(module: nn.Module) -> None:
    """Have gradients that are partial sums over ranks reduced when they come, as `fully_shard` does for its parameters.

    Such are those of a whole parameter, of a norm say, that each rank applies to its part of a sequence.
    """
    for each in module.parameters():
        if is_dtensor(each) and each.requires_grad:
            each.register_hook(_reducer(each))  # type: ignore[no-untyped-call]


def _reducer(parameter: DTensor) -> Callable[[torch.Tensor], torch.Tensor]:
    mesh, placements = parameter.device_mesh, parameter.placements

    def reduced(gradient: torch.Tensor) -> torch.Tensor:
        is_partial = is_dtensor(gradient) and any(isinstance(one, Partial) for one in gradient.placements)
        return gradient.redistribute(mesh, placements) if is_partial else gradient  # type: ignore[attr-defined]

    return reduced
