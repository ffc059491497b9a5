"""A store that is frozen, and one that is not."""

from __future__ import annotations

import signal
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from allstep.errors import WorldError
from allstep.world.store import AnsweringStore, poll
from tests.jobs.processes import freeze
from tests.world.frozen_store import served_store


def test_calls_give_what_the_store_gives():
    raw = dist.HashStore()
    store = AnsweringStore(raw)
    store.set("key", "value")
    assert raw.get("key") == b"value" == store.get("key")
    assert (store.add("count", 2), store.add("count", 0)) == (2, 2)
    assert (store.check(["key"]), store.check(["key", "none"])) == (True, False)
    assert store.compare_set("owner", "", "me") == b"me" == store.compare_set("owner", "", "you")


def test_a_space_keeps_its_keys_apart():
    store = AnsweringStore(dist.HashStore())
    store.space("a").set("key", "of a")
    assert not store.check(["key"])
    assert store.space("a").get("key") == b"of a"
    assert not store.space("b").check(["key"])


def test_what_the_store_raises_is_raised():
    class Broken:
        def add(self, key: str, amount: int) -> int:
            raise dist.DistNetworkError("gone")

    with pytest.raises(dist.DistNetworkError, match="gone"):
        AnsweringStore(Broken()).add("key", 1)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_frozen_store_is_waited_for_once_and_serves_again_when_it_goes_on():
    with served_store() as (server, port):
        raw = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=600), wait_for_workers=False)
        store = AnsweringStore(raw, patience=3.0)
        store.set("key", "value")
        freeze(server.pid)
        with pytest.raises(WorldError, match="did not answer within 3 s"):
            store.get("key")
        began = time.monotonic()
        with pytest.raises(WorldError, match="did not answer"):
            store.add("count", 1)
        assert time.monotonic() - began < 2.0
        server.send_signal(signal.SIGCONT)

        def answered() -> bool:
            try:
                return store.get("key") == b"value"
            except WorldError:
                return False

        assert poll(answered, time.monotonic() + 30)
