"""Metrics on two devices that are computed at one event: states travel over one device and come back to their own.

Stand-in: torch's meta device takes the part of an accelerator. It has no values, so it is looked at where tensors lie.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torchmetrics import Metric

from allstep.metrics.exchange import Gathered
from allstep.metrics.nodes import metric_set
from allstep.metrics.packing import BlockWriter, block_values, pack, unpack
from allstep.metrics.reduction import states_of_all_ranks
from allstep.metrics.states import ReductionPlan, make_plan

HOST, DEVICE = torch.device("cpu"), torch.device("meta")


class States(Metric):
    """A tensor and a list of them on a device, after one batch."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.add_state("total", torch.zeros(3, device=device), dist_reduce_fx="sum")
        self.add_state("mean", torch.zeros(2, device=device), dist_reduce_fx="mean")
        self.add_state("seen", [], dist_reduce_fx="cat")
        self.seen.append(torch.ones(2, device=device))
        self._update_count = 1

    def update(self) -> None:
        """Nothing is taken in."""

    def compute(self) -> torch.Tensor:
        """The sum."""
        return self.total


def plan_over(*devices: torch.device) -> ReductionPlan:
    return make_plan("event", metric_set({f"m{at}": States(each) for at, each in enumerate(devices)}).nodes, {})


def test_what_is_on_the_host_travels_over_the_device_of_the_others():
    plan = plan_over(HOST, DEVICE)
    assert [(block.device, block.numel()) for block in block_values(plan)] == [(DEVICE, 6)]
    payload = torch.empty(plan.block_bytes, dtype=torch.uint8, device=plan.device)
    BlockWriter(plan, payload).write()
    packed = pack(plan, {})
    assert {part.device for part in packed.parts} == {DEVICE}


def test_the_results_are_where_each_metric_has_its_states():
    plan = replace(plan_over(HOST, DEVICE), device=HOST)  # from the host to the meta device there is a way
    packed = pack(replace(plan_over(HOST, HOST), device=HOST), {})
    payload = torch.zeros(plan.block_bytes + packed.size, dtype=torch.uint8)
    rank = unpack(plan, packed.manifest, payload, at=plan.block_bytes)
    states, _ = states_of_all_ranks(Gathered(plan, [torch.zeros(6)], [rank, rank]))
    for node in plan.nodes:
        found = states[id(node.metric)]
        assert {found[name].device for name in ("total", "mean", "seen")} == {node.metric.device}, node.name
