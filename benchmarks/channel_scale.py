"""What a hub costs at the head of a large job: nodes of 8 ranks, each rank with a heartbeat a second.

The hub runs in a process of its own, driven by a plain selector loop, as a supervisor drives it, with the watchdog at
work. This process speaks for all nodes: a connection per node, over which the hellos and heartbeats of its ranks come
as a relay passes them on, each node's in one write, the nodes spread over the second. The latency is from the write to
when the hub has noted the heartbeat, on one machine's one clock. At the end one rank fails: the time from its report to
the hub's verdict (which waits 0.3 s for a cause that stands before it) and until the last node has the order to leave.

    python benchmarks/channel_scale.py [--nodes 8 64 512] [--ranks 8] [--seconds 20]
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent))

from allstep.monitor import hub as hub_module
from allstep.monitor.failure_detector import FailureDetector
from allstep.monitor.hub import Hub
from allstep.monitor.service import AllArrived, MonitorSettings, Verdict
from allstep.protocol.connection import connect
from allstep.protocol.messages import (
    Failure,
    Heartbeat,
    Leave,
    NodeHeartbeat,
    NodeHello,
    RankHello,
    Welcome,
    decode,
    encode,
)
from allstep.protocol.registration import RankRegistration

KEY = "benchmark"
WARM_UP = 3.0  # seconds of heartbeats that are not measured


class MeasuredDetector(FailureDetector):
    """Keeps how old each heartbeat was when it had been noted."""

    latencies: ClassVar[list[float]] = []

    def beat(self, heartbeat: Heartbeat) -> None:
        super().beat(heartbeat)
        self.latencies.append(time.monotonic() - heartbeat.longest["idle"])  # where the sender put the time


def serve(world_size: int) -> None:
    """The hub's process: print the port, then what was measured, then when the verdict came."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    selector = selectors.DefaultSelector()
    hub_module.FailureDetector = MeasuredDetector
    hub = Hub(selector, listener, MonitorSettings(KEY, 0, world_size))
    for node in range(world_size):
        hub.expect_node(node)
    latencies = MeasuredDetector.latencies
    print(listener.getsockname()[1], flush=True)
    os.set_blocking(0, False)
    selector.register(0, selectors.EVENT_READ, "command")
    began = cpu = 0.0
    while True:
        for key, _ in selector.select(max(0.0, hub.deadline() - time.monotonic())):
            if key.data != "command":
                hub.ready(key)
                continue
            command = os.read(0, 64)
            if not command:
                return
            if command == b"begin\n":
                latencies.clear()
                began, cpu = time.monotonic(), time.process_time()
            elif command == b"end\n":
                figures = {
                    "cpu": (time.process_time() - cpu) / (time.monotonic() - began),
                    "median": statistics.median(latencies),
                    "p99": statistics.quantiles(latencies, n=100)[98],
                    "beats": len(latencies) / (time.monotonic() - began),
                    "descriptors": len(os.listdir("/proc/self/fd")),
                    "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
                }
                print(json.dumps(figures), flush=True)
        if time.monotonic() >= hub.deadline():
            hub.tick()
        for event in hub.take():
            if isinstance(event, AllArrived):
                print("arrived", flush=True)
            elif isinstance(event, Verdict):
                print(json.dumps({"verdict": time.monotonic(), "rank": event.diagnosis.cause.rank}), flush=True)
                hub.order_leave("the benchmark is over", 84, printer=0, report="x" * 4096)


class Node:
    """One relay's connection, and the ranks that it speaks for."""

    def __init__(self, port: int, number: int, ranks: range, world_size: int) -> None:
        self.connection = connect([("127.0.0.1", port)], key=KEY, within=30, answer=30)
        self.ranks = ranks
        self.number = 0
        self.left = False
        lines = [encode(NodeHello(0, number, f"node{number}", tuple(ranks)))]
        for rank in ranks:
            registration = RankRegistration(rank, world_size, f"node{number}", rank, "cuda", "nccl", f"GPU-{rank}")
            lines.append(encode(RankHello(0, registration)))
        self.connection.send(b"".join(lines))
        self.template = json.loads(
            encode(Heartbeat(0, 0, 0, 1, 1, "step", 0.01, "", "trainer", {"data": 0.1, "step": 0.5}, 0.012))
        )

    def beat(self) -> None:
        self.number += 1
        now = time.monotonic()
        lines = [encode(NodeHeartbeat())]
        for rank in self.ranks:
            self.template.update(
                rank=rank, number=self.number, iteration=self.number, longest={"idle": now, "step": 0.5}
            )
            lines.append(json.dumps(self.template, separators=(",", ":")).encode() + b"\n")
        self.connection.send(b"".join(lines))

    def listen(self) -> list[object]:
        return [decode(line) for line in self.connection.receive()]


def keep_beating(nodes: list[Node], seconds: float) -> None:
    """Each node once a second, one after the other."""
    began = time.monotonic()
    sent = 0
    while (now := time.monotonic()) < began + seconds:
        due = int((now - began) * len(nodes)) + 1
        for index in range(sent, due):
            nodes[index % len(nodes)].beat()
        sent = max(sent, due)
        time.sleep(0.001)
        for node in nodes[(sent % len(nodes)) :: len(nodes)]:
            node.listen()


def measure(count: int, ranks: int, seconds: float) -> dict[str, float]:
    world_size = count * ranks
    with subprocess.Popen(
        [sys.executable, __file__, "--serve", str(world_size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = int(process.stdout.readline())
        began = time.monotonic()
        nodes = [Node(port, n, range(n * ranks, (n + 1) * ranks), world_size) for n in range(count)]
        assert process.stdout.readline() == "arrived\n"
        arrived = time.monotonic() - began
        for node in nodes:
            while not any(isinstance(each, Welcome) for each in node.listen()):
                time.sleep(0.001)
        keep_beating(nodes, WARM_UP)
        process.stdin.write("begin\n")
        process.stdin.flush()
        keep_beating(nodes, seconds)
        process.stdin.write("end\n")
        process.stdin.flush()
        figures: dict[str, float] = json.loads(process.stdout.readline())
        figures["arrived"] = arrived
        failed = time.monotonic()
        last = world_size - 1
        nodes[-1].connection.send(encode(Failure(last, 0, 1, "ValueError", "bad batch", "Traceback ...\n")))
        while not all(node.left for node in nodes):
            for node in nodes:
                node.left = node.left or any(isinstance(each, Leave) for each in node.listen())
            assert time.monotonic() < failed + 60
        figures["left"] = time.monotonic() - failed
        verdict = json.loads(process.stdout.readline())
        assert verdict["rank"] == last
        figures["verdict"] = verdict["verdict"] - failed
        process.stdin.close()
        for node in nodes:
            node.connection.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--ranks", type=int, default=8, help="of each node")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    from machine import machine_line

    print(machine_line(), f"; load {os.getloadavg()[0]:.1f} before", sep="")
    print(f"\nHeartbeats for {options.seconds:g} s, one a second from each rank; the last columns are one failure.\n")
    print(
        "| nodes | ranks | all arrived, s | heartbeats/s | hub's CPU share of a core | latency median, ms | p99, ms "
        "| file descriptors | memory, MiB | failure to verdict, s | to the last order, s |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for count in options.nodes:
        f = measure(count, options.ranks, options.seconds)
        print(
            f"| {count} | {count * options.ranks:,} | {f['arrived']:.2f} | {f['beats']:,.0f} | {f['cpu']:.1%} "
            f"| {f['median'] * 1e3:.2f} | {f['p99'] * 1e3:.1f} | {f['descriptors']} | {f['memory'] / 2**20:.0f} "
            f"| {f['verdict']:.2f} | {f['left']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
