"""What crosses ranks over the host and what over the device, and that a step reads nothing from the device.

Stand-in: two gloo groups take the parts of nccl's default group and of the host's. Which of them carries a collective
is counted by torch's own record of collectives. Reads of a device's values are counted by `HostReads`, which follows
tensors through their operations.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from allstep.engine import Engine, Events
from allstep.metrics import Mean, Metrics
from allstep.testing import run_ranks
from allstep.trainers import create_supervised_trainer
from allstep.world import World
from allstep.world.collectives import Collectives
from allstep.world.payload import encode
from tests.world.host_reads import HostReads

META = torch.device("meta")


def issued() -> Counter[str]:
    """How many collectives each group of this process has on record, by the group's name."""
    record = json.loads(torch._C._distributed_c10d._dump_fr_trace_json(True, False))
    return Counter(entry["process_group"][0] for entry in record.get("entries", ()))


def by_lane(world: World) -> dict[str, dict[str, int]]:
    host = dist.new_group(backend="gloo")
    host_name = str(host.group_name)
    # The transport is no CPU, so that what travels over it is seen; nothing of these may be put there.
    collectives = Collectives(world.rank, world.world_size, META, META, lambda: host)
    counts = {}
    for name, call in {
        "number": lambda: collectives.all_reduce(1.5, "sum"),
        "object": lambda: collectives.gather_objects({"rank": world.rank}),
        "barrier": collectives.barrier,
        "broadcast": lambda: collectives.broadcast(3, 0),
        "host tensor": lambda: collectives.all_gather(torch.ones(2)),
    }.items():
        before = issued()
        try:
            call()
        except NotImplementedError:  # a tensor that was put on the stand-in for a device
            counts[name] = {"moved": 1}
            continue
        after = issued() - before
        counts[name] = {"host": after.pop(host_name, 0), "others": sum(after.values())}
    return counts


@pytest.mark.slow
def test_numbers_objects_and_headers_go_over_the_host():
    found = run_ranks(by_lane, 2)
    expected = {
        "number": {"host": 1, "others": 0},
        "object": {"host": 2, "others": 0},
        "barrier": {"host": 1, "others": 0},
        "broadcast": {"host": 1, "others": 0},
    }
    assert [{name: each[name] for name in expected} for each in found] == [expected] * 2


def test_the_bytes_of_a_tensor_on_a_device_go_over_the_device():
    headers = [encode(torch.ones(2)).header(), encode(torch.ones(2, device="meta")).header()]
    host = object()
    collectives = Collectives(0, 2, META, META, lambda: host)
    assert collectives._way_of(headers) == (META, None)
    assert collectives._way_of(headers[:1]) == (torch.device("cpu"), host)


def reads(world: World) -> tuple[dict[str, int], dict[str, int]]:
    """What the host reads in the iterations of an epoch, and what in a step that asks for a value."""
    torch.manual_seed(0)
    model = world.wrap(nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        nn.functional.cross_entropy,
        clip_norm=1.0,
        output_transform=lambda x, y, y_pred, loss: {"loss": loss, "y_pred": y_pred, "y": y},
    )
    accuracy = MulticlassAccuracy(num_classes=3, validate_args=False)
    outputs = {"loss": lambda output: output["loss"], "accuracy": lambda output: (output["y_pred"], output["y"])}
    Metrics({"loss": Mean(), "accuracy": accuracy}).attach(trainer, outputs)
    data = [(torch.randn(2, 4), torch.tensor([0, 2])) for _ in range(8)]
    with HostReads(model) as mode:
        counted: list[dict[str, int]] = []
        trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: mode.reads.clear())
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: counted.append(dict(mode.reads)))
        trainer.run(data, max_epochs=2)
    with HostReads(model) as mode:
        Engine(lambda engine, batch: model(batch[0]).sum().item()).run(data[:1])
    return counted[-1], dict(mode.reads)


@pytest.mark.slow
def test_no_step_vote_or_update_of_a_metric_reads_from_the_device():
    for in_iterations, asked in run_ranks(reads, 2):
        assert in_iterations == {}
        assert asked["_local_scalar_dense"] == 1  # the stand-in counts
