"""Which machine of several this is: from settings and from SLURM, with nothing guessed."""

from __future__ import annotations

from typing import Any

import pytest

from allstep.errors import ConfigurationError, PlacementError
from allstep.launch.settings import LaunchSettings
from allstep.launch.topology import Nodes, find_nodes, warning
from tests.placement.recorded import recorded

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}


def test_without_a_word_about_machines_there_is_one() -> None:
    assert find_nodes(LaunchSettings(), {}) is None
    assert find_nodes(LaunchSettings(nnodes=1), STEP) is None


def test_the_three_settings_say_which_machine_this_is_and_where_they_meet() -> None:
    settings = LaunchSettings(nnodes=2, node_rank=1, rdzv="head.cluster:29400")
    assert find_nodes(settings, STEP) == Nodes(2, 1, "head.cluster", (29400,))
    head = find_nodes(LaunchSettings(nnodes=2, node_rank=0, rdzv="[fe80::1]:29400"), {})
    assert head == Nodes(2, 0, "fe80::1", (29400,))
    assert head.head


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nnodes": 2}, "--node-rank, --rdzv are missing"),
        ({"nnodes": 2, "node_rank": 1}, "--rdzv is missing"),
        ({"rdzv": "h:1"}, "--nnodes, --node-rank are missing"),
        ({"nnodes": 2, "node_rank": 2, "rdzv": "h:1"}, "node_rank is 2; it must be less than nnodes, which is 2"),
    ],
)
def test_what_is_missing_or_cannot_be_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find_nodes(LaunchSettings(**settings), {})


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "a b:1", "fe80::1:2"])
def test_a_meeting_place_is_a_host_and_a_port(text: str) -> None:
    with pytest.raises(ConfigurationError, match="HOST:PORT"):
        LaunchSettings(rdzv=text)


def test_one_task_of_a_slurm_step_is_one_machine() -> None:
    nodes = find_nodes(LaunchSettings(), STEP)
    assert nodes is not None
    assert (nodes.count, nodes.rank, nodes.host, nodes.job) == (3, 1, "n1", "7.0")
    assert len(nodes.ports) > 1
    assert nodes.ports == find_nodes(LaunchSettings(), STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).ports  # type: ignore[union-attr]


def test_a_port_set_for_the_job_is_the_one() -> None:
    nodes = find_nodes(LaunchSettings(), STEP | {"MASTER_ADDR": "n9", "MASTER_PORT": "4711"})
    assert nodes is not None
    assert (nodes.host, nodes.ports) == ("n9", (4711,))


def test_several_tasks_on_a_node_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigurationError, match=r"srun started 2 tasks on this node .* --ntasks-per-node=1"):
        find_nodes(LaunchSettings(), recorded("srun_in_batch_0"))


def test_contradictions_in_slurms_variables_are_errors() -> None:
    with pytest.raises(PlacementError, match="SLURM_STEP_NODELIST"):
        find_nodes(LaunchSettings(), STEP | {"SLURM_STEP_NODELIST": "n[1-2]"})


def test_a_batch_script_of_several_nodes_is_one_machine_with_a_warning() -> None:
    script = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"}
    assert find_nodes(LaunchSettings(), script) is None
    assert "the job has 2 nodes, but only this one is used" in warning(script)
    lsf = {"LSB_JOBID": "7", "LSB_MCPU_HOSTS": "n1 4 n2 4"}
    assert "the job has 2 machines, but only this one is used; to use them all start it by launch/hosts" in warning(lsf)
    assert warning({"LSB_JOBID": "7", "LSB_MCPU_HOSTS": "n1 8"}) == ""
    assert warning({}) == warning(STEP) == ""


POD = {"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "10.96.0.1", "HOSTNAME": "train-1"}


def test_a_pod_of_an_indexed_job_is_the_node_of_its_number() -> None:
    settings = LaunchSettings(nnodes=2, rdzv="train-0.train:29400")
    assert find_nodes(settings, POD) == Nodes(2, 1, "train-0.train", (29400,))
    given = LaunchSettings(nnodes=2, node_rank=0, rdzv="train-0.train:29400")
    assert find_nodes(given, POD) == Nodes(2, 0, "train-0.train", (29400,))


def test_a_pod_of_a_sweep_is_a_run_of_its_own() -> None:
    assert find_nodes(LaunchSettings(), POD) is None
    assert find_nodes(LaunchSettings(nnodes=1), POD) is None


@pytest.mark.parametrize("index", ["2", "x", ""])
def test_a_pods_number_that_cannot_be_is_an_error(index: str) -> None:
    with pytest.raises(PlacementError, match="JOB_COMPLETION_INDEX"):
        find_nodes(LaunchSettings(nnodes=2, rdzv="train-0.train:29400"), POD | {"JOB_COMPLETION_INDEX": index})


def test_a_pod_that_is_not_told_where_to_meet_is_told_what_is_missing() -> None:
    with pytest.raises(ConfigurationError, match="--rdzv is missing"):
        find_nodes(LaunchSettings(nnodes=2), POD)
