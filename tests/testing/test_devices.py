"""Where the ranks of a test compute. Stand-in: the number of GPUs is made up."""

from __future__ import annotations

import pytest

from allstep.testing import RanksError, run_ranks
from allstep.testing.rank_process import device_options
from allstep.world import World


@pytest.mark.parametrize(
    ("asked", "gpus", "ranks", "options"),
    [
        (None, 0, 1, {"device": "cpu"}),
        (None, 1, 2, {"device": "cpu"}),
        (None, 2, 2, {}),
        (None, 8, 1, {}),
        ("cuda", 1, 2, {"device": "cuda:0", "backend": "gloo"}),
        ("cuda", 2, 3, {"device": "cuda:1", "backend": "gloo"}),
        ("cuda", 2, 2, {"device": "cuda"}),
        ("cuda", 0, 2, {"device": "cuda"}),  # which `init` refuses
        ("cpu", 8, 2, {"device": "cpu"}),
    ],
)
def test_ranks_have_gpus_where_there_are_enough_or_they_are_asked_for(asked, gpus, ranks, options):
    environ = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": str(ranks)}
    assert device_options(asked, environ, lambda: gpus) == options


def where(world: World) -> str:
    return str(world.device)


@pytest.mark.slow
def test_a_device_that_is_asked_for_is_used_or_refused(world_of):
    assert world_of(2, device="cpu")(where) == ["cpu", "cpu"]
    with pytest.raises(RanksError, match="sees no CUDA device"):
        run_ranks(where, 1, device="cuda", env={"CUDA_VISIBLE_DEVICES": ""})
