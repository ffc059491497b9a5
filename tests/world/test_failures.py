"""Which exceptions are about another rank's end, and what a rank reports of its own: what, when and how often."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch.distributed as dist

from allstep.errors import DivergenceError, WorldError
from allstep.world import internals
from allstep.world.failures import summarize
from tests.world.watching import watched_world

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
    assert summarize(error).derived


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
    assert not summarize(error).derived


def test_clean_up_that_fails_without_peers_does_not_hide_the_error_before():
    about = summarize(raised(ValueError("the true cause"), RuntimeError(GLOO)))
    assert (about.kind, about.message, about.derived) == ("ValueError", "the true cause", False)
    assert "the true cause" in about.traceback
    assert GLOO in about.traceback


def test_an_error_in_handling_a_lost_peer_is_derived_under_its_own_name():
    about = summarize(raised(RuntimeError(GLOO), NameError("name 'logg' is not defined")))
    assert (about.kind, about.derived) == ("NameError", True)


def test_an_error_of_allsteps_that_came_from_a_lost_store_is_derived():
    about = summarize(raised(dist.DistNetworkError("failed to recv"), WorldError("the store was lost")))
    assert (about.kind, about.derived) == ("allstep.errors.WorldError", True)


def test_a_chain_that_bites_its_own_tail_ends():
    first, second = RuntimeError(GLOO), ValueError("x")
    first.__context__, second.__context__ = second, first
    assert summarize(first).kind == "ValueError"


def test_a_kind_is_named_in_full_and_a_traceback_has_the_line_that_raised():
    class Own(Exception):
        def __str__(self) -> str:
            raise TypeError("no text")

    try:
        raise Own
    except Own as error:
        about = summarize(error)
    assert about.kind.endswith(
        "test_failures.test_a_kind_is_named_in_full_and_a_traceback_has_the_line_that_raised.<locals>.Own"
    )
    assert "raise Own" in about.traceback
    assert about.message == "<a Own whose text cannot be made>"


def failures(client) -> list[tuple[str, bool]]:
    return [(each.kind, each.leaving) for each in client.said if not isinstance(each, str)]


@pytest.mark.parametrize(
    ("error", "kind"), [(ValueError("x"), "ValueError"), (SystemExit(3), "SystemExit"), (MemoryError(), "MemoryError")]
)
def test_an_exception_that_leaves_the_world_is_reported_before_it_ends(error, kind):
    with watched_world() as (world, client, activity):
        activity.epoch, activity.iteration = 2, 17
        with pytest.raises(type(error)), world:
            raise error
    failure = client.said[0]
    assert (failure.kind, failure.leaving, failure.rank, failure.attempt) == (kind, True, 0, 3)
    assert (failure.epoch, failure.iteration, failure.section, failure.device) == (2, 17, "startup", "cpu")
    assert "raise error" in failure.traceback
    assert client.said[1:] == []  # no goodbye: the connection ends with the process


@pytest.mark.parametrize("error", [SystemExit(), SystemExit(0), KeyboardInterrupt()])
def test_ctrl_c_and_an_exit_with_code_0_are_no_failures(error):
    with pytest.raises(type(error)), watched_world() as (world, client, _), world:
        raise error
    assert failures(client) == []


def test_a_world_that_is_closed_says_goodbye():
    with watched_world() as (world, client, _), world:
        pass
    assert client.said == ["bye"]


def test_a_world_that_nobody_closes_says_so(monkeypatch):
    registered = []
    monkeypatch.setattr("atexit.register", registered.append)
    with watched_world() as (_, client, _):
        (at_exit,) = registered
        at_exit()
    assert client.said == ["left open"]


def test_an_uncaught_exception_is_reported_before_it_is_printed(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "excepthook", lambda *args: printed.append(len(client.said)))
    hook = sys.excepthook
    with watched_world() as (_, client, _):
        error = ValueError("nobody caught it")
        sys.excepthook(ValueError, error, None)
        sys.excepthook(ValueError, error, None)
        assert failures(client) == [("ValueError", True)]
        assert printed == [1, 1]
    assert sys.excepthook is hook


def test_a_hook_that_was_wrapped_meanwhile_stays_and_is_silent_afterwards(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "excepthook", lambda *args: printed.append(args[1]))
    with watched_world() as (_, client, _):
        ours = sys.excepthook

        def theirs(*args):
            ours(*args)

        sys.excepthook = theirs
    assert sys.excepthook is theirs
    error = ValueError("later")
    sys.excepthook(ValueError, error, None)
    assert printed == [error]
    assert failures(client) == []


def test_an_exception_is_said_once_when_seen_and_once_when_leaving():
    with watched_world() as (world, client, _):
        error = ValueError("x")
        for _ in range(2):
            internals(world).reporter.seen(error)
        for _ in range(2):
            internals(world).reporter.leaving(error)
        internals(world).reporter.seen(error)
    assert failures(client) == [("ValueError", False), ("ValueError", True)]


def test_without_a_supervisor_a_failed_process_stays_for_the_report(monkeypatch):
    registered = []
    monkeypatch.setattr("atexit.register", lambda call, *args: registered.append((call, args)))
    for supervised in (True, False):
        with pytest.raises(ValueError, match="x"), watched_world(supervised) as (world, client, _), world:
            raise ValueError("x")
    ((call, arguments),) = [each for each in registered if each[1]]  # those of the Worlds themselves have no argument
    call(*arguments)
    assert client.said[-1] == "linger"


def test_a_completed_collective_takes_back_what_was_seen():
    with watched_world() as (world, client, activity):
        assert internals(world).reporter is not None
        internals(world).reporter.seen(ValueError("caught"))
        with pytest.raises(RuntimeError), activity.wait("barrier #1"):
            raise RuntimeError("Connection closed by peer")
        assert "withdraw" not in client.said
        for _ in range(2):
            with activity.wait("barrier #2"):
                pass
        assert client.said.count("withdraw") == 1
