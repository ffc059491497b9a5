"""`launch/kubernetes.yaml`: its parts fit each other, and what it runs is there."""

from __future__ import annotations

import pytest

from allstep.cli.run_command import split_command
from allstep.errors import PlacementError
from allstep.exit_codes import NEVER_AGAIN, PEER_LOST, PREEMPTED, USER_ERROR
from allstep.launch.settings import OPTIONS, LaunchSettings
from allstep.launch.topology import find_nodes
from tests.jobs.launchers import ROOT
from tests.launch.kubernetes_job import FILE, after, container, job, line, objects, pod, pod_name


def options() -> dict[str, str]:
    """The options of `allstep run` in a pod, by name."""
    return dict(each[2:].split("=", 1) for each in line()[2:] if each.startswith("--") and "=" in each)


def settings() -> LaunchSettings:
    given = {option.flag[2:]: option for option in OPTIONS if option.flag}
    values = {given[name].name: given[name].value(text) for name, text in options().items() if name in given}
    return LaunchSettings(**values)


def test_a_pod_runs_an_example_with_a_configuration_that_exists() -> None:
    assert line()[:2] == ["allstep", "run"]
    own, rest = split_command(line()[2:], frozenset())
    assert own[-1] == f"--config={options()['config']}"
    assert (ROOT / options()["config"]).is_file()
    assert (ROOT / rest[0]).is_file()


def test_pods_are_as_many_as_nodes_and_all_run_at_once() -> None:
    assert job()["completionMode"] == "Indexed"
    assert job()["completions"] == job()["parallelism"] == settings().nnodes


def test_pods_find_pod_0_by_the_name_that_the_service_gives_it() -> None:
    service = objects()["Service"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": objects()["Job"]["metadata"]["name"]}
    for index in range(job()["completions"]):
        nodes = find_nodes(settings(), {"JOB_COMPLETION_INDEX": str(index)})
        assert nodes is not None
        assert (nodes.rank, nodes.host) == (index, f"{pod_name(0)}.{pod()['subdomain']}")
    assert pod()["subdomain"] == service["metadata"]["name"]


def test_a_pod_more_than_the_command_says_is_refused() -> None:
    with pytest.raises(PlacementError, match="The Job needs as many completions as nnodes says"):
        find_nodes(settings(), {"JOB_COMPLETION_INDEX": str(job()["completions"])})


def test_a_pod_has_longer_to_end_than_its_workers() -> None:
    assert settings().grace + 10 <= pod()["terminationGracePeriodSeconds"]


def test_each_exit_code_has_the_end_that_it_means() -> None:
    assert after(PREEMPTED) == after(137, disrupted=True) == "Ignore"
    assert after(NEVER_AGAIN) == "FailJob"
    assert after(USER_ERROR) == after(PEER_LOST) == after(137) == "Count"
    assert {
        rule.get("onExitCodes", {}).get("containerName", "train") for rule in job()["podFailurePolicy"]["rules"]
    } == {container()["name"]}


def test_logs_and_checkpoints_are_on_the_volume_that_all_pods_have() -> None:
    (volume,) = [each for each in pod()["volumes"] if "persistentVolumeClaim" in each]
    (mount,) = [each["mountPath"] for each in container()["volumeMounts"] if each["name"] == volume["name"]]
    assert options()["runs"] == mount
    assert options()["checkpoints"].startswith(f"{mount}/")


def test_the_file_says_which_places_hold_the_number_of_pods() -> None:
    assert "`completions`,\n# `parallelism` and `--nnodes`" in FILE.read_text()
