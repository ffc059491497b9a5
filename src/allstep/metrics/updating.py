"""Updating one metric, at less than torchmetrics' own bookkeeping costs and to the same effect.

Contract: torchmetrics puts a function around the `update` of each metric. It forgets the result that was computed last,
counts the batch, turns gradients off, says more of an error about devices, and moves lists to the host where a metric
asks for it. An `Update` does the same with less: attributes are set in the metric's dictionary and not through
`torch.nn.Module`, and gradients are off already, once for all metrics of a batch. The metric's own `update` is what is
called, and afterwards the metric is as that function would have left it, also where an error ended it. Where something
else is around an `update`, or a metric asks for more, it is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from allstep.metrics.nodes import Entry
from allstep.metrics.torchmetrics_private import inside_update


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """How something that is fed takes a batch in.

    Attributes:
        entry: what.
        around: the function that torchmetrics put around its `update`.
        inside: that `update`; None where there is no such function.
    """

    entry: Entry
    around: Any
    inside: Callable[..., Any] | None

    def __call__(self, given: Sequence[Any], named: Mapping[str, Any], gradients: bool) -> None:
        """Call `update`; to be called while gradients are off.

        Args:
            given: positional arguments.
            named: keyword arguments.
            gradients: whether gradients were on before they were turned off for all metrics.
        """
        held, inside = self.entry.__dict__, self.inside
        if inside is None or held.get("update") is not self.around or held["_enable_grad"] or held["compute_on_cpu"]:
            with torch.set_grad_enabled(gradients):
                self._as_it_is(given, named)
            return
        held["_computed"] = None
        held["_update_count"] += 1
        try:
            inside(*given, **named)
        except RuntimeError as error:
            self._raise_as_torchmetrics(error)

    def _as_it_is(self, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        self.entry.update(*given, **named)
        if isinstance(self.entry, WrapperMetric):  # these do not count
            self.entry._update_count += 1

    def _raise_as_torchmetrics(self, error: RuntimeError) -> None:
        """Raise what torchmetrics makes of an error in `update`, in its words."""
        assert isinstance(self.entry, Metric)

        def fail() -> None:
            raise error

        self.entry._update_count -= 1  # it is counted once more
        Metric._wrap_update(self.entry, fail)()


def update_of(entry: Entry) -> Update:
    """How something that is fed takes a batch in."""
    inside = inside_update(entry) if isinstance(entry, Metric) else None
    return Update(entry, vars(entry).get("update"), inside)
