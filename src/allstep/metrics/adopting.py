"""States of a rank that has seen nothing, in the shapes and types that updates gave them on other ranks.

Contract: some metrics begin with a number and make it a row at the first update (torchmetrics' `R2Score` of several
outputs), so that ranks that have taken batches differ from those that have not. `adopt` is called on all ranks when
their schemas differ: what a metric without a batch holds is its beginning, which is as well spread over the shape of
the others. What still differs then is raised on all ranks alike; a beginning that cannot be spread so is left, and
shows in the next comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from allstep.coordination import Coordinator, Schema, check_schemas
from allstep.metrics.plan import Form, Plan, form_of


@dataclass(frozen=True, slots=True)
class _Held:
    """What one rank says: its schema, and for each line of a state whether a batch entered it, its shape and type."""

    schema: Schema
    seen: tuple[bool, ...]
    forms: tuple[Form, ...]


def adopt(coordinator: Coordinator, plan: Plan) -> None:
    """Give the states of this rank's metrics that have seen nothing the shapes of other ranks.

    Raises:
        MetricMismatchError: ranks differ in more than that.
    """
    states = [(node, name) for node in plan.nodes for name in node.metric._defaults]
    values = [getattr(node.metric, name) for node, name in states]
    own = _Held(
        plan.schema,
        tuple(node.updates > 0 for node, _ in states),
        tuple(map(form_of, values)),
    )
    said: list[_Held] = coordinator.gather(own)
    models = _models(said)
    check_schemas([_as_models(each, said, models) for each in said])
    for at, (node, name) in enumerate(states):
        form, default = said[models[at]].forms[at], node.metric._defaults[name]
        if not own.seen[at] and form is not None and isinstance(default, torch.Tensor):
            shape, dtype = form
            device = getattr(node.metric, name).device
            with suppress(RuntimeError):
                setattr(node.metric, name, default.to(device, dtype).expand(shape).clone())


def _models(said: Sequence[_Held]) -> list[int]:
    """For each state the first rank that a batch entered it on, rank 0 where there is none."""
    count = min(len(each.seen) for each in said)
    return [next((rank for rank, each in enumerate(said) if each.seen[at]), 0) for at in range(count)]


def _as_models(held: _Held, said: Sequence[_Held], models: Sequence[int]) -> Schema:
    """A rank's schema if it took the shapes of others for what it has not seen."""
    taken = [
        said[model].schema[at] if not seen and said[model].schema[at][:3] == line[:3] else line
        for at, (line, seen, model) in enumerate(zip(held.schema, held.seen, models, strict=False))
    ]
    return (*taken, *held.schema[len(taken) :])
