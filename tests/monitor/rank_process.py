"""One rank with a real client: `rank_process.py ADDRESS KEY RANK WORLD_SIZE [WHAT]`, without importing torch."""

from __future__ import annotations

import ctypes
import os
import pdb
import select
import signal
import socket
import sys
import time
import traceback

from allstep.errors import WorldError
from allstep.monitor.client import Client
from allstep.protocol.heartbeat import RankActivity
from allstep.protocol.messages import Failure, RankHello
from allstep.protocol.registration import RankRegistration


def train(activity: RankActivity, iteration: int) -> None:
    with activity.run("trainer"):
        activity.epoch, activity.iteration = 1, iteration
        activity.enter("step")


def failure(activity: RankActivity, error: BaseException, **options: bool) -> Failure:
    place = {"epoch": activity.epoch, "iteration": activity.iteration, "section": activity.section_name}
    text = "".join(traceback.format_exception(error))
    return Failure(0, 0, 0, type(error).__name__, str(error), text, **place, **options)


def fail_in_step() -> None:
    raise ValueError("bad batch")


def main() -> None:
    address, key, rank, world_size, *what = sys.argv[1:]
    action = what[0] if what else "wait"
    activity = RankActivity()
    host, node = socket.gethostname(), int(os.environ.get("NODE", "0"))
    registration = RankRegistration(int(rank), int(world_size), host, os.getpid(), "cpu", "gloo", node_rank=node)
    try:
        client = Client.connect(address, key, RankHello(0, registration), timeout=20)
    except WorldError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    client.start(activity)
    print("welcome", flush=True)
    with activity.run("trainer"):
        activity.epoch, activity.iteration = 1, 7
        activity.enter("step")
        if action == "wait":
            activity.wait_began("gradients")
            time.sleep(600)  # the wait itself
        elif action == "sleep":
            time.sleep(600)  # what it was told to do
        elif action in ("raise", "raise_slowly"):
            try:
                fail_in_step()
            except ValueError as error:
                client.report(failure(activity, error))
                if action == "raise_slowly":
                    time.sleep(600)  # its slow clean-up
                client.linger(10)
                raise
        elif action == "derived":
            try:
                raise ConnectionError("Connection closed by peer")
            except ConnectionError as error:
                client.report(failure(activity, error, derived=True))
                raise
        elif action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "segfault":
            ctypes.string_at(0)
        elif action == "abort":
            os.abort()
        elif action == "exit":
            os._exit(3)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "hold_gil":
            sys.stdin.readline()  # until a heartbeat has told where it is
            ctypes.PyDLL(None).sleep(600)
        elif action == "burn":
            sum(range(10**12))  # one call, in which no other thread runs
        elif action == "prompt":
            pdb.Pdb(stdin=sys.stdin, stdout=sys.stdout, nosigint=True).set_trace()
        elif action == "fork":
            if os.fork() == 0:
                for fd in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
                closed = select.poll()
                closed.register(0, 0)
                closed.poll()  # the test's end
                os._exit(0)
            sys.stdin.readline()
            os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.readline()
    client.close()


if __name__ == "__main__":
    main()
