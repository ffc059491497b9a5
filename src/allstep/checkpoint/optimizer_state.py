"""What is saved of an optimizer, and how it comes back to one of another mesh.

Contract: torch keeps an optimizer's state by the parameters' positions in its groups. A checkpoint has, beside that,
the name of each parameter (`param_names`): that of its tensor in the module which is saved with it. A run that has the
same names takes the states by name, so its order and its groups may be others, such as one group for each mesh that
parameters are sharded over. The options of a new group are those that its parameters were saved with. Where a
parameter is in no saved module, or names differ, positions count, as in torch.

A fresh optimizer has no states, so the parameters themselves are the template: a state of a sharded parameter is
sharded as the parameter is. What can go wrong is a CheckpointError, with what to do: other groups of other sizes, or
options of which a group would have several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from allstep.checkpoint.reading import FromDocument, ShardedLike
from allstep.errors import CheckpointError
from allstep.parallel import PlainNames, is_dtensor

NAMES = "param_names"


class OptimizerAdapter:
    """An optimizer; its states of sharded parameters are sharded as they are.

    Args:
        value: the optimizer.
        modules: what is saved with it, by name, without wrappers.
    """

    def __init__(self, value: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> None:
        self.value = value
        self._modules = modules

    def states(self) -> tuple[Any, Any]:
        """The state, with the names of parameters."""
        state, names = self.value.state_dict(), self._names()
        return ({**state, NAMES: names} if names and NAMES not in state else state), None

    def template(self) -> Any:
        """What the states of each parameter are sharded as; which is which, the saved names say."""
        return FromDocument(self._template)

    def load(self, state: Any, rank_states: list[Any], rank: int) -> None:
        """Take over `state`."""
        saved, here = _saved_names(state), self._names()
        if _are_same(saved, here):
            state = _in_order(state, saved, here, [len(group["params"]) for group in self.value.param_groups])
        else:
            _check_groups(self.value, state)
        self.value.load_state_dict({key: each for key, each in state.items() if key != NAMES})
        # A fused optimizer goes over the memory of a parameter and of its moments side by side, so they must lie alike
        # in this run, which may lay its parameters out in another way than the run that saved.
        for parameter, of_parameter in self.value.state.items():
            if isinstance(of_parameter, dict) and isinstance(parameter, torch.Tensor):
                for key, each in of_parameter.items():
                    of_parameter[key] = _laid_out_like(parameter, each)

    def _parameters(self) -> list[torch.Tensor]:
        """The parameters as `Optimizer.state_dict` counts them."""
        return list({id(each): each for group in self.value.param_groups for each in group["params"]}.values())

    def _names(self) -> list[str]:
        """The name of each parameter; none of them unless all have one of their own."""
        known: dict[int, str] = {}
        for module_name, module in self._modules.items():
            names = PlainNames(module)
            for name, each in module.named_parameters():
                known.setdefault(id(each), f"{module_name}/{names.plain(name)}")
        found = [known.get(id(each)) for each in self._parameters()]
        named = [each for each in found if each is not None]
        return named if len(set(named)) == len(found) else []

    def _template(self, saved_state: Any) -> Any:
        parameters = self._parameters()
        saved, here = _saved_names(saved_state), self._names()
        if _are_same(saved, here):
            by_name = dict(zip(here, parameters, strict=True))
            parameters = [by_name[name] for name in saved]
        return {"state": {at: ShardedLike(each.detach()) for at, each in enumerate(parameters)}}


def _saved_names(state: Any) -> list[str]:
    """The names in a saved state, or in its document; none where it is of an earlier version, or no such thing."""
    names = state.get(NAMES) if isinstance(state, Mapping) else None
    return list(names) if isinstance(names, list) and all(type(each) is str for each in names) else []


def _are_same(saved: Sequence[str], here: Sequence[str]) -> bool:
    return len(saved) == len(here) > 0 and set(saved) == set(here)


def _in_order(state: Any, saved: Sequence[str], here: Sequence[str], sizes: Sequence[int]) -> Any:
    """A saved state as an optimizer with these parameters, in groups of these sizes, would have saved it."""
    if saved == here and [len(group["params"]) for group in state["param_groups"]] == sizes:
        return state
    group_of = {saved[at]: group for group in state["param_groups"] for at in group["params"]}
    groups, begin = [], 0
    for size in sizes:
        names = here[begin : begin + size]
        options = [{key: each for key, each in group_of[name].items() if key != "params"} for name in names]
        for name, each in zip(names, options, strict=True):
            if each != options[0]:
                differing = sorted(
                    key for key in each.keys() | options[0].keys() if each.get(key) != options[0].get(key)
                )
                raise CheckpointError(
                    f"the optimizer has {names[0]} and {name} in one group, and they were saved in two whose "
                    f"{', '.join(differing)} differ; put them in different groups, as the saved run had them"
                )
        groups.append({**(options[0] if options else {}), "params": list(range(begin, begin + size))})
        begin += size
    place = {name: at for at, name in enumerate(here)}
    new_at = {at: place[name] for at, name in enumerate(saved)}
    states = {new_at.get(at, at): each for at, each in state["state"].items()}
    return {**state, "state": states, "param_groups": groups}


def _laid_out_like(parameter: torch.Tensor, value: Any) -> Any:
    """A state of a parameter, in memory as the parameter is where it has its shape."""
    if not isinstance(value, torch.Tensor) or is_dtensor(value) or is_dtensor(parameter):
        return value
    if value.shape != parameter.shape or value.stride() == parameter.stride() or value.layout is not torch.strided:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


def _check_groups(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Refuse a state of other parameter groups, with what to do: torch says only that they differ."""
    saved, here = (
        [len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)
    )
    if saved == here:
        return
    raise CheckpointError(
        f"the optimizer was saved with {_in_words(saved)}, and this run's has {_in_words(here)}. Groups that are added "
        "on the way, as by add_param_group in a handler, are to be there before resume(): ask what the newest "
        "checkpoint is of, found = checkpoint.store.choose(), and add them where found.manifest.facts['epoch'] says "
        "that the saved run had"
    )


def _in_words(sizes: Sequence[int]) -> str:
    groups = "1 parameter group" if len(sizes) == 1 else f"{len(sizes)} parameter groups"
    return f"{groups} (of {', '.join(map(str, sizes))} parameters)"
