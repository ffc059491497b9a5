"""`allstep run --preflight` on machines that are several `allstep run` on one; tests/hosts has real networks."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.jobs.job import Job
from tests.jobs.launchers import script
from tests.jobs.ports import free_port
from tests.jobs.running import started

pytestmark = pytest.mark.slow


def flown(folder: Path, count: int, *options: str) -> list[Job]:
    target, port = str(script(folder, "print('trained', os.environ['GROUP_RANK'])")), free_port()
    with contextlib.ExitStack() as stack:
        jobs = []
        for node in range(count):
            own = folder / f"node{node}"
            own.mkdir()
            place = ["--nnodes", str(count), "--node-rank", str(node), "--rdzv", f"127.0.0.1:{port}"]
            jobs.append(stack.enter_context(started(own, *place, *options, target)))
        return [job.end() for job in jobs]


def test_an_ill_machine_is_named_and_left_out_and_the_others_train(tmp_path: Path) -> None:
    fault = "rank=1,when=preflight,wrong_sums"
    jobs = flown(tmp_path, 3, "--nproc", "1", "--preflight", "--exclude-ill", "1", "--fault", fault)
    assert [job.code for job in jobs] == [0, 0, 0], jobs[0].text
    (ill,) = [line for line in jobs[0].err.splitlines() if "ill: " in line]
    assert ill.startswith("allstep: preflight: ill: node 1 (")
    assert "device 0 (cpu): it computes wrong sums" in ill
    assert "this machine is left out" in jobs[1].err
    assert [job.out for job in jobs] == ["[0] trained 0\n", "", "[1] trained 1\n"]  # without a gap


@pytest.mark.nightly
def test_nothing_is_started_where_an_ill_machine_cannot_be_left_out(tmp_path: Path) -> None:
    jobs = flown(tmp_path, 2, "--nproc", "1", "--preflight", "--fault", "rank=1,when=preflight,clock=60")
    assert [job.code for job in jobs] == [2, 2], jobs[0].text
    assert "its clock is 60 s ahead of the others'" in jobs[0].err
    assert "so nothing was started; --exclude-ill 1 would go on without" in jobs[0].err
    assert "refused: the preflight found node 1 ill" in jobs[1].err
    assert all(not job.out for job in jobs)


@pytest.mark.nightly
def test_a_machine_that_is_gone_in_a_preflight_is_named(tmp_path: Path) -> None:
    target, port = str(script(tmp_path, "print('trained')")), free_port()
    place = ["--nnodes", "2", "--rdzv", f"127.0.0.1:{port}", "--preflight", "--nproc", "1"]
    for node in range(2):
        (tmp_path / f"node{node}").mkdir()
    with (
        started(tmp_path / "node0", *place, "--node-rank", "0", target) as head,
        started(tmp_path / "node1", *place, "--node-rank", "1", target) as other,
    ):
        from tests.jobs.processes import await_condition

        await_condition(lambda: len(other.pids()) > 2)  # its agent has started the device's process
        other.kill()
        job = head.end()
    assert job.code == 2
    assert "node 1 (" in job.err
    assert "did not come to the end of the step 'look'" in job.err


@pytest.mark.nightly
def test_one_machine_alone_has_its_devices_compared(tmp_path: Path) -> None:
    target = str(script(tmp_path, "print('trained')"))
    with started(tmp_path, "--preflight", "--nproc", "2", target) as running:
        job = running.end()
    assert job.code == 0, job.text
    assert "preflight: 1 node, 0 pairs, 2 devices, all fit" in job.err
