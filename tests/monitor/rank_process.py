"""One rank with a real client: `rank_process.py ADDRESS NONCE RANK WORLD_SIZE [WHAT]`, without importing torch."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import time
import traceback

from allstep.errors import WorldError
from allstep.monitor.client import Client
from allstep.protocol.heartbeat import RankActivity
from allstep.protocol.messages import Failure, Hello
from allstep.protocol.registration import Registration


def train(pulse: RankActivity, iteration: int) -> None:
    with pulse.run("trainer"):
        pulse.epoch, pulse.iteration = 1, iteration
        pulse.enter("step")


def failure(pulse: RankActivity, error: BaseException, **options: bool) -> Failure:
    place = {"epoch": pulse.epoch, "iteration": pulse.iteration, "section": pulse.section_name}
    text = "".join(traceback.format_exception(error))
    return Failure(0, 0, 0, type(error).__name__, str(error), text, **place, **options)


def fail_in_step() -> None:
    raise ValueError("bad batch")


def main() -> None:
    address, nonce, rank, world_size, *what = sys.argv[1:]
    action = what[0] if what else "wait"
    pulse = RankActivity()
    arrival = Registration(int(rank), int(world_size), socket.gethostname(), os.getpid(), "cpu", "gloo")
    try:
        client = Client.connect(address, Hello(nonce, 0, arrival), timeout=20)
    except WorldError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    client.start(pulse)
    print("welcome", flush=True)
    with pulse.run("trainer"):
        pulse.epoch, pulse.iteration = 1, 7
        pulse.enter("step")
        if action == "wait":
            pulse.wait_began("gradients")
            time.sleep(600)  # the wait itself
        elif action == "sleep":
            time.sleep(600)  # what it was told to do
        elif action in ("raise", "raise_slowly"):
            try:
                fail_in_step()
            except ValueError as error:
                client.report(failure(pulse, error))
                if action == "raise_slowly":
                    time.sleep(600)  # its slow clean-up
                client.linger(10)
                raise
        elif action == "derived":
            try:
                raise ConnectionError("Connection closed by peer")
            except ConnectionError as error:
                client.report(failure(pulse, error, derived=True))
                raise
        elif action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "hold_gil":
            time.sleep(0.2)  # the first beat
            ctypes.PyDLL(None).sleep(600)
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
