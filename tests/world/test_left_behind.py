"""A call into native code that comes back while the interpreter ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import datetime, socket, sys, threading, time
from torch.distributed import TCPStore
from allstep.world.store import leave_behind

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
leave_behind(thread)
lingers = Lingers(peer)
sys.exit(7)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or sys.version_info >= (3, 14), reason="nothing would abort")
def test_a_thread_that_is_left_behind_changes_no_exit_status() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 7, ended.stderr
