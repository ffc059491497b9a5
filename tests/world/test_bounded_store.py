"""A store that is frozen, and one that is not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from allstep.errors import WorldError
from allstep.world.bounded_store import BoundedStore, poll
from tests.jobs.processes import freeze
from tests.world.frozen_store import served_store


def test_calls_give_what_the_store_gives():
    raw = dist.HashStore()
    store = BoundedStore(raw)
    store.set("key", "value")
    assert raw.get("key") == b"value" == store.get("key")
    assert (store.add("count", 2), store.add("count", 0)) == (2, 2)
    assert (store.check(["key"]), store.check(["key", "none"])) == (True, False)
    assert store.compare_set("owner", "", "me") == b"me" == store.compare_set("owner", "", "you")


def test_a_prefix_keeps_keys_apart():
    store = BoundedStore(dist.HashStore())
    store.with_prefix("a").set("key", "of a")
    assert not store.check(["key"])
    assert store.with_prefix("a").get("key") == b"of a"
    assert not store.with_prefix("b").check(["key"])


def test_what_the_store_raises_is_raised():
    class Broken:
        def add(self, key: str, amount: int) -> int:
            raise dist.DistNetworkError("gone")

    with pytest.raises(dist.DistNetworkError, match="gone"):
        BoundedStore(Broken()).add("key", 1)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_frozen_store_is_waited_for_once_and_serves_again_when_it_goes_on():
    with served_store() as (server, port):
        raw = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=600), wait_for_workers=False)
        store = BoundedStore(raw, patience=3.0)
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


SCRIPT = """
import datetime, socket, sys, threading, time
from torch.distributed import TCPStore
from allstep.world.bounded_store import abandon_thread

class Lingers:
    def __init__(self, peer):
        self.peer, self.sleep = peer, time.sleep
    def __del__(self):  # while the interpreter ends
        self.peer.close()
        self.sleep(0.5)

def connect():
    TCPStore("127.0.0.1", port, None, False, datetime.timedelta(seconds=1), wait_for_workers=False)

silent = socket.create_server(("127.0.0.1", 0))
port = silent.getsockname()[1]
thread = threading.Thread(target=connect, daemon=True)
thread.start()
peer = silent.accept()[0]
silent.close()
abandon_thread(thread)
lingers = Lingers(peer)
sys.exit(7)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or sys.version_info >= (3, 14), reason="nothing would abort")
def test_an_abandoned_thread_changes_no_exit_status() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 7, ended.stderr
