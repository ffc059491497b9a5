"""What a rank says about its exceptions, when, and how often."""

from __future__ import annotations

import sys

import pytest

from tests.world.watching import watched_world


def failures(client) -> list[tuple[str, bool]]:
    return [(each.kind, each.leaving) for each in client.said if not isinstance(each, str)]


@pytest.mark.parametrize(
    ("error", "kind"), [(ValueError("x"), "ValueError"), (SystemExit(3), "SystemExit"), (MemoryError(), "MemoryError")]
)
def test_an_exception_that_leaves_the_world_is_reported_before_it_ends(error, kind):
    with watched_world() as (world, client, pulse):
        pulse.epoch, pulse.iteration = 2, 17
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


def test_a_world_that_nobody_closes_says_so():
    with watched_world() as (world, client, _):
        world.leave_at_exit()
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
            world.reporter.seen(error)
        for _ in range(2):
            world.reporter.leaving(error)
        world.reporter.seen(error)
    assert failures(client) == [("ValueError", False), ("ValueError", True)]


def test_without_a_supervisor_a_failed_process_stays_for_the_report(monkeypatch):
    registered = []
    monkeypatch.setattr("atexit.register", lambda call, *args: registered.append((call, args)))
    for supervised in (True, False):
        with pytest.raises(ValueError, match="x"), watched_world(supervised) as (world, client, _), world:
            raise ValueError("x")
    ((call, arguments),) = registered
    call(*arguments)
    assert client.said[-1] == "linger"


def test_meeting_the_others_again_takes_back_what_was_seen():
    with watched_world() as (world, client, pulse):
        assert world.reporter is not None
        world.reporter.seen(ValueError("caught"))
        with pytest.raises(RuntimeError), pulse.wait("barrier #1"):
            raise RuntimeError("Connection closed by peer")
        assert "withdraw" not in client.said
        for _ in range(2):
            with pulse.wait("barrier #2"):
                pass
        assert client.said.count("withdraw") == 1
