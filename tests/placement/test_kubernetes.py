"""A pod of an Indexed Job that runs the script itself: its number is its rank where it is told of others."""

from __future__ import annotations

import pytest

from allstep.errors import PlacementError
from allstep.placement import Placement, Rendezvous, detect

POD = {"JOB_COMPLETION_INDEX": "2", "KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
TOLD = {"WORLD_SIZE": "4", "MASTER_ADDR": "train-0.train", "MASTER_PORT": "29500"}


def test_a_pod_that_is_told_of_others_is_the_rank_of_its_number() -> None:
    assert detect(POD | TOLD) == Placement(
        launcher="kubernetes",
        rank=2,
        world_size=4,
        node_rank=2,
        nodes=4,
        rendezvous=Rendezvous(host="train-0.train", ports=(29500,)),
        run_id="train-0.train:29500",
    )


def test_a_pod_that_is_told_of_no_others_trains_alone() -> None:
    assert detect(POD).launcher == "alone"
    assert detect(POD | {"WORLD_SIZE": "1", "JOB_COMPLETION_INDEX": "0"}).world_size == 1


def test_a_rank_that_is_given_comes_before_the_pods_number() -> None:
    place = detect(POD | TOLD | {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert (place.launcher, place.rank, place.node_rank, place.nodes) == ("torchrun", 1, 0, 2)


def test_a_worker_of_a_launcher_in_a_pod_is_the_launchers() -> None:
    local = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
    local |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert detect(POD | TOLD | local).launcher == "mpi"


@pytest.mark.parametrize(
    ("changes", "variable"),
    [
        ({"JOB_COMPLETION_INDEX": "4"}, "JOB_COMPLETION_INDEX"),
        ({"JOB_COMPLETION_INDEX": "one"}, "JOB_COMPLETION_INDEX"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK"),
    ],
)
def test_what_contradicts_or_is_garbage_is_refused(changes: dict[str, str], variable: str) -> None:
    with pytest.raises(PlacementError) as caught:
        detect(POD | TOLD | changes)
    assert caught.value.variable == variable


def test_a_meeting_place_that_is_missing_is_asked_for_with_the_remedy() -> None:
    with pytest.raises(PlacementError, match=r"MASTER_ADDR is not set.* or run `allstep run` in each pod"):
        detect(POD | {"WORLD_SIZE": "4"})
