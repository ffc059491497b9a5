"""`allstep run` over two hosts: a run works, and a link that is cut ends both sides within the limit."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest

from tests.hosts.hosts import Hosts
from tests.launch.command import LIMIT, await_end, environment, pids, script, watch

pytestmark = pytest.mark.slow

TRAIN = """
import torch
import allstep
from allstep import Engine

def main(world):
    model = world.wrap(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(engine, batch):
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        if engine.state.iteration == 2:
            print("pid", os.getpid(), flush=True)
        return loss.detach()

    trainer = Engine(train_step)
    trainer.run([torch.ones(2, 4)] * STEPS, max_epochs=1)
    print("steps", trainer.state.iteration, "of", world.placement.nodes, "nodes")

with allstep.init() as world:
    main(world)
"""


@contextlib.contextmanager
def run_on_both(hosts: Hosts, folder: Path, steps: int, limits: str) -> Iterator[list[Popen[str]]]:
    target = script(folder, TRAIN.replace("STEPS", str(steps)))
    with contextlib.ExitStack() as stack:
        processes = []
        for host in range(2):
            own = folder / hosts.names[host]
            own.mkdir()
            place = ["--nnodes", "2", "--node-rank", str(host), "--rdzv", f"{hosts.names[0]}:29400", "--limits", limits]
            command = [sys.executable, "-m", "allstep", "run", *place, str(target)]
            processes.append(stack.enter_context(hosts.start(host, command, folder=own, env=environment())))
        yield processes


def test_a_run_trains_over_two_hosts(hosts: Hosts, tmp_path: Path) -> None:
    with run_on_both(hosts, tmp_path, 10, "link=15") as processes:
        for rank, process in enumerate(processes):
            out, said = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, said
            assert f"[{rank}] steps 10 of 2 nodes\n" in out


def test_a_link_that_is_cut_ends_both_sides_within_the_limit(hosts: Hosts, tmp_path: Path) -> None:
    limit = 4
    with run_on_both(hosts, tmp_path, 10_000_000, f"link={limit}") as processes:
        workers = []
        for process in processes:
            assert process.stdout is not None
            workers += pids([process.stdout.readline()])
        watched = watch(workers)
        hosts.cut(1)
        began = time.monotonic()
        said = [process.communicate(timeout=LIMIT)[1] for process in processes]
        took = time.monotonic() - began
        await_end(watched)
    assert [process.returncode for process in processes] == [84, 84], said
    assert took < limit + 20, said
    assert "node 1" in said[0]
    assert "host0" in said[1]
    assert "was not heard from for 4 s" in said[1]
