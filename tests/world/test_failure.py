"""Which exceptions are about another rank's end: a pure decision."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch.distributed as dist

from allstep.errors import DivergenceError, WorldError
from allstep.world.failures import describe

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"


def raised(*errors: BaseException) -> BaseException:
    """The last of some exceptions, each raised while the one before was handled."""
    for earlier, later in pairwise(errors):
        later.__context__ = earlier
    return errors[-1]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms for recv operation"),
        RuntimeError("Application timeout caused pair closure"),
        RuntimeError("NCCL communicator was aborted on rank 1."),
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        dist.DistStoreError("wait timeout after 300000ms"),
    ],
)
def test_what_a_lost_peer_causes_is_derived(error):
    assert describe(error).derived


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Connection closed by peer"),
        RuntimeError("[gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed."),
        ConnectionResetError("the data's server went away"),
        DivergenceError("ranks came to different votes: rank 0 timed out 3 ms"),
        WorldError("two processes are rank 1"),
        OSError("No space left on device"),
    ],
)
def test_other_errors_are_not(error):
    assert not describe(error).derived


def test_clean_up_that_fails_for_want_of_peers_does_not_hide_the_error_before_it():
    about = describe(raised(ValueError("the true cause"), RuntimeError(GLOO)))
    assert (about.kind, about.message, about.derived) == ("ValueError", "the true cause", False)
    assert "the true cause" in about.traceback
    assert GLOO in about.traceback


def test_an_error_in_handling_a_lost_peer_is_derived_under_its_own_name():
    about = describe(raised(RuntimeError(GLOO), NameError("name 'logg' is not defined")))
    assert (about.kind, about.derived) == ("NameError", True)


def test_an_error_of_allsteps_that_came_from_a_lost_store_is_derived():
    about = describe(raised(dist.DistNetworkError("failed to recv"), WorldError("the store was lost")))
    assert (about.kind, about.derived) == ("allstep.errors.WorldError", True)


def test_a_chain_that_bites_its_own_tail_ends():
    first, second = RuntimeError(GLOO), ValueError("x")
    first.__context__, second.__context__ = second, first
    assert describe(first).kind == "ValueError"


def test_a_kind_is_named_in_full_and_a_traceback_has_the_line_that_raised():
    class Own(Exception):
        def __str__(self) -> str:
            raise TypeError("no text")

    try:
        raise Own
    except Own as error:
        about = describe(error)
    assert about.kind.endswith(
        "test_failure.test_a_kind_is_named_in_full_and_a_traceback_has_the_line_that_raised.<locals>.Own"
    )
    assert "raise Own" in about.traceback
    assert about.message == "<a Own whose text cannot be made>"
