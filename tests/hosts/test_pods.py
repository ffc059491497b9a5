"""`launch/kubernetes.yaml` over two hosts that stand for its pods: what they run, and how a Job goes on.

Each pod is a network namespace with the name, the variables and the names of others that Kubernetes gives it, and runs
the file's own command. Who starts pods again is this test, by the file's policy; a real cluster is not here.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.bridged import BridgedHosts
from tests.hosts.conftest import opened_bridge
from tests.jobs.job import Job
from tests.jobs.launchers import ROOT
from tests.jobs.programs import SYSTEM_PATH
from tests.jobs.running import Running, start
from tests.launch.kubernetes_job import after, job, line, pod, pod_name

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(600)]

COUNT = job()["completions"]
RUN_S = 300.0
VOLUME = "/runs"


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BridgedHosts]:
    name = pod_name(0).removesuffix("0")
    with opened_bridge(tmp_path_factory.mktemp("pods"), COUNT, name=name, domain=pod()["subdomain"]) as made:
        yield made


@contextlib.contextmanager
def started(pods: BridgedHosts, index: int, volume: Path) -> Iterator[Running]:
    """A pod's container: the file's command with the variables that it finds."""
    command = [sys.executable, "-m", *(each.replace(VOLUME, str(volume)) for each in line())]
    own = volume / f"of-pod-{index}"  # what a container writes is its own
    own.mkdir(exist_ok=True)
    environ = {
        "JOB_COMPLETION_INDEX": str(index),
        "HOSTNAME": pods.names[index],
        "KUBERNETES_SERVICE_HOST": "10.96.0.1",
        "KUBERNETES_SERVICE_PORT": "443",
        "ALLSTEP_SECRET": "0123456789abcdef",
        "XDG_CONFIG_HOME": str(own),
        "PATH": SYSTEM_PATH,
        "OMP_NUM_THREADS": "1",
    }
    with start(ROOT, [*pods.inside(index), *command], env=environ) as running:
        yield running


def ended(running: Running) -> Job:
    return running.end(limit=RUN_S)


def accuracy(done: Job) -> str:
    (said,) = [each for each in done.out.splitlines() if "test accuracy 0" in each and "samples" in each]
    return said


@pytest.fixture(scope="module")
def unbroken(pods: BridgedHosts, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run over all pods that nothing disturbs says at its end."""
    volume = tmp_path_factory.mktemp("unbroken")
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(started(pods, index, volume)) for index in range(COUNT)]
        done = [ended(each) for each in running]
    assert [each.code for each in done] == [0] * COUNT, done[0].text
    assert f"{2 * COUNT} rank(s) on cpu" in done[0].out
    return accuracy(done[0])


def test_a_pod_that_is_preempted_stops_all_and_the_job_goes_on(
    pods: BridgedHosts, unbroken: str, tmp_path: Path
) -> None:
    with started(pods, 0, tmp_path) as first, started(pods, 1, tmp_path) as second:
        first.await_line("epoch  2")
        second.process.send_signal(signal.SIGTERM)  # its node is drained
        done = [ended(first), ended(second)]
    assert [after(each.code) for each in done] == ["Ignore", "Ignore"], done[0].text
    with started(pods, 1, tmp_path) as second, started(pods, 0, tmp_path) as first:
        done = [ended(first), ended(second)]
    assert [each.code for each in done] == [0, 0], done[0].text
    assert "epoch  1:" not in done[0].out
    assert accuracy(done[0]) == unbroken


def test_a_pod_that_is_killed_is_replaced_while_the_other_waits(
    pods: BridgedHosts, unbroken: str, tmp_path: Path
) -> None:
    with started(pods, 0, tmp_path) as first:
        with started(pods, 1, tmp_path) as second:
            first.await_line("epoch  2")
            second.kill()
            assert after(128 + signal.SIGKILL) == "Count"
        first.await_line("restart 1 of at most 3")
        with started(pods, 1, tmp_path) as second:
            done = [ended(first), ended(second)]
    assert [each.code for each in done] == [0, 0], done[0].text
    assert accuracy(done[0]) == unbroken


def test_pod_0_that_is_killed_ends_the_others_and_all_begin_again(
    pods: BridgedHosts, unbroken: str, tmp_path: Path
) -> None:
    with started(pods, 0, tmp_path) as first, started(pods, 1, tmp_path) as second:
        first.await_line("epoch  2")
        first.kill()
        done = ended(second)
    assert done.code == 84, done.text
    assert after(done.code) == "Count"
    with started(pods, 0, tmp_path) as first, started(pods, 1, tmp_path) as second:
        again = [ended(first), ended(second)]
    assert [each.code for each in again] == [0, 0], again[0].text
    assert accuracy(again[0]) == unbroken
