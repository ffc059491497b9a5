"""The coordinator over real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from allstep.testing import run_ranks
from allstep.world import World, internals

pytestmark = pytest.mark.slow


def _says(world: World) -> tuple[list[int], list[Any], Any]:
    coordinator = internals(world).coordinator
    pending = coordinator.vote([coordinator.rank, 1 << 40, 7])
    batch = {"x": torch.arange(3), "deep": [("text", torch.tensor(2.5, dtype=torch.bfloat16))], "rank": world.rank}
    return pending.wait(), coordinator.gather(str(world.rank)), coordinator.broadcast(batch, source=2)


def test_votes_are_summed_and_values_gathered_and_broadcast() -> None:
    for summed, gathered, batch in run_ranks(_says, 4):
        assert summed == [6, 1 << 42, 28]
        assert gathered == ["0", "1", "2", "3"]
        assert batch["rank"] == 2
        assert batch["x"].tolist() == [0, 1, 2]
        assert torch.equal(batch["deep"][0][1], torch.tensor(2.5, dtype=torch.bfloat16))


def _shares_a_batch_on_its_device(world: World) -> tuple[bool, list[int]]:
    own = torch.device("cuda", world.rank % torch.cuda.device_count())
    torch.cuda.set_device(own)
    shared = internals(world).coordinator.broadcast(torch.arange(3, device=own) if world.rank == 1 else None, source=1)
    return str(shared.device) == str(own), shared.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_on_a_gpu_arrives_on_the_receivers_own() -> None:
    assert run_ranks(_shares_a_batch_on_its_device, 2) == [(True, [0, 1, 2])] * 2
