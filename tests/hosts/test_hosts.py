"""`allstep run` over two hosts: a run works, and a link that is cut ends both sides within the limit."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from allstep.diagnosis.hang import HangLimits
from tests.hosts.conftest import opened_hosts
from tests.hosts.hosts import Hosts
from tests.jobs.launchers import script
from tests.jobs.processes import await_end, pids, watch

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


@pytest.mark.nightly
def test_a_run_trains_over_two_hosts(hosts: Hosts, tmp_path: Path) -> None:
    target = script(tmp_path, TRAIN.replace("STEPS", "10"))
    with hosts.started(0, tmp_path, target) as first, hosts.started(1, tmp_path, target) as second:
        for rank, running in enumerate((first, second)):
            job = running.end()
            assert job.code == 0, job.text
            assert f"[{rank}] steps 10 of 2 nodes\n" in job.out


@pytest.mark.nightly
@pytest.mark.parametrize("own_name", [pytest.param("127.0.1.1", id="loopback"), pytest.param("", id="unknown")])
def test_a_run_trains_where_the_hosts_own_names_are_of_no_use(own_name: str, tmp_path: Path) -> None:
    target = script(tmp_path, TRAIN.replace("STEPS", "10"))
    with (
        opened_hosts(tmp_path, own_name) as hosts,
        hosts.started(0, tmp_path, target) as first,
        hosts.started(1, tmp_path, target) as second,
    ):
        for rank, running in enumerate((first, second)):
            job = running.end()
            assert job.code == 0, job.text
            assert f"[{rank}] steps 10 of 2 nodes\n" in job.out


def test_row_22_a_link_that_is_cut_ends_both_sides_within_the_limit(hosts: Hosts, tmp_path: Path) -> None:
    limit, default = 4.0, HangLimits().link
    target = script(tmp_path, TRAIN.replace("STEPS", "10_000_000"))
    options = ["--limits", f"link={limit:g}"]
    with hosts.started(0, tmp_path, *options, target) as head, hosts.started(1, tmp_path, *options, target) as other:
        watched = watch(pids([*head.await_line("pid"), *other.await_line("pid")]))
        hosts.cut(1)
        cut = time.monotonic()
        gone = await_end(watched) - cut
        jobs = [head.end(), other.end()]
    assert [job.code for job in jobs] == [84, 84], [job.text for job in jobs]
    for took in (gone, *(job.ended - cut for job in jobs)):
        assert (
            limit - 1.5 < took < default - 1.0
        )  # the last word came up to a second before; the default would be later
    assert "node 1" in jobs[0].err
    assert "a node of its 2 ranks was lost" in jobs[0].block[0]
    assert "host0" in jobs[1].err
    silent = re.search(r"was not heard from for (\d+) s", jobs[1].err)
    assert silent, jobs[1].err
    assert limit <= int(silent[1]) < default - 1.0
