"""Each launcher's real environment gives the place that the launcher gave the process."""

from __future__ import annotations

import pytest

from allstep.errors import PlacementError
from allstep.placement import Placement, detect
from tests.placement.recorded import all_names, recorded

# launcher, rank, world size, local rank, local world size, node rank, nodes, attempt, run id, host
PLACES = {
    "hydra_0": ("mpi", 0, 2, 0, 2, 0, 1, 0, "mpi", "127.0.0.1"),
    "hydra_1": ("mpi", 1, 2, 1, 2, 0, 1, 0, "mpi", "127.0.0.1"),
    "lsf_job": ("alone", 0, 1, 0, 1, 0, 1, 0, "748", None),
    "openmpi_0": ("mpi", 0, 2, 0, 2, 0, 1, 0, "1954873345", "127.0.0.1"),
    "openmpi_1": ("mpi", 1, 2, 1, 2, 0, 1, 0, "1954873345", "127.0.0.1"),
    "slurm_batch_script": ("alone", 0, 1, 0, 1, 0, 1, 0, "7", None),
    "slurm_batch_script_nodes_only": ("alone", 0, 1, 0, 1, 0, 1, 0, "8", None),
    "slurm_batch_script_single": ("alone", 0, 1, 0, 1, 0, 1, 0, "9", None),
    "slurm_salloc_interactive_step": ("alone", 0, 1, 0, 1, 0, 1, 0, "1", None),
    "slurm_salloc_shell": ("alone", 0, 1, 0, 1, 0, 1, 0, "10", None),
    "srun_alone": ("slurm", 0, 1, 0, 1, 0, 1, 0, "5.0", None),
    "srun_cyclic_1": ("slurm", 1, 4, 0, 1, 1, 2, 0, "4.0", "n1"),
    "srun_cyclic_3": ("slurm", 3, 4, 2, 3, 0, 2, 0, "4.0", "n1"),
    "srun_in_batch_0": ("slurm", 0, 4, 0, 2, 0, 2, 0, "7.0", "n1"),
    "srun_in_batch_1": ("slurm", 1, 4, 1, 2, 0, 2, 0, "7.0", "n1"),
    "srun_in_batch_2": ("slurm", 2, 4, 0, 2, 1, 2, 0, "7.0", "n1"),
    "srun_in_batch_3": ("slurm", 3, 4, 1, 2, 1, 2, 0, "7.0", "n1"),
    "srun_n1_in_two_node_job": ("slurm", 0, 1, 0, 1, 0, 1, 0, "7.1", None),
    "srun_nested_1": ("slurm", 1, 2, 0, 1, 1, 2, 0, "7.3", "n1"),
    "srun_pmi2_3": ("slurm", 3, 4, 0, 1, 1, 2, 0, "1.0", "n1"),
    "srun_requeued_1": ("slurm", 1, 2, 0, 1, 1, 2, 1, "15.0", "n1"),
    "srun_torchrun_3": ("torchrun", 3, 4, 1, 2, 1, 2, 0, "14", "localhost"),
    "srun_uneven_0": ("slurm", 0, 3, 0, 2, 0, 2, 0, "3.0", "n1"),
    "srun_uneven_1": ("slurm", 1, 3, 1, 2, 0, 2, 0, "3.0", "n1"),
    "srun_uneven_2": ("slurm", 2, 3, 0, 1, 1, 2, 0, "3.0", "n1"),
    "torque_job": ("alone", 0, 1, 0, 1, 0, 1, 0, "314827.server", None),
    "torchrun_0": ("torchrun", 0, 2, 0, 2, 0, 1, 0, "a83115da-45ab-43a2-a311-540e8e84ccb4", "localhost"),
    "torchrun_1": ("torchrun", 1, 2, 1, 2, 0, 1, 0, "a83115da-45ab-43a2-a311-540e8e84ccb4", "localhost"),
}
REFUSED = {
    "salloc_hydra_3": ("MASTER_ADDR", "not set"),
    "salloc_openmpi_3": ("MASTER_ADDR", "not set"),
    "slurm_batch_script_from_a_step": ("SLURM_STEP_NODELIST", "inherited from another step"),
}


def summary(place: Placement) -> tuple[object, ...]:
    host = place.rendezvous.host if place.rendezvous else None
    local = (place.local_rank, place.local_world_size, place.node_rank, place.nodes)
    return (place.launcher, place.rank, place.world_size, *local, place.attempt, place.run_id, host)


def test_every_recorded_environment_has_an_expectation() -> None:
    assert sorted([*PLACES, *REFUSED]) == all_names()


@pytest.mark.parametrize("name", PLACES)
def test_place_of(name: str) -> None:
    assert summary(detect(recorded(name))) == PLACES[name]


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_of(name: str) -> None:
    variable, words = REFUSED[name]
    with pytest.raises(PlacementError, match=words) as caught:
        detect(recorded(name))
    assert caught.value.variable == variable


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("slurm_batch_script", "SLURM_NTASKS=4, SLURM_JOB_NUM_NODES=2"),
        ("slurm_batch_script_nodes_only", "SLURM_JOB_NUM_NODES=2"),
        ("slurm_salloc_interactive_step", "SLURM_NTASKS=4"),
        ("slurm_salloc_shell", "SLURM_NTASKS=4"),
        ("hydra_0", "no name"),
        ("lsf_job", "the job has 3 machines"),
    ],
)
def test_warning_of(name: str, words: str) -> None:
    (warning,) = detect(recorded(name)).warnings
    assert words in warning


@pytest.mark.parametrize("name", sorted(PLACES.keys() - {"hydra_0", "hydra_1"}))
def test_no_warning_without_need(name: str) -> None:
    asks_for_more = {
        "lsf_job",
        "slurm_batch_script",
        "slurm_batch_script_nodes_only",
        "slurm_salloc_interactive_step",
        "slurm_salloc_shell",
    }
    assert bool(detect(recorded(name)).warnings) == (name in asks_for_more)


@pytest.mark.parametrize("launcher", ["srun_in_batch", "openmpi", "hydra"])
def test_all_ranks_of_a_launch_meet_at_the_same_place(launcher: str) -> None:
    names = [name for name in PLACES if name.startswith(launcher)]
    meetings = {detect(recorded(name)).rendezvous for name in names}
    assert len(names) > 1
    assert len(meetings) == 1


@pytest.mark.parametrize("name", ["torchrun_1", "srun_torchrun_3"])
def test_torchrun_store_is_served_by_the_agent(name: str) -> None:
    place = detect(recorded(name))
    assert place.rendezvous is not None
    assert place.rendezvous.agent_store
    assert place.rendezvous.ports == (int(recorded(name)["MASTER_PORT"]),)


@pytest.mark.parametrize("name", ["salloc_openmpi_3", "salloc_hydra_3"])
def test_mpirun_in_a_slurm_job_is_mpi_and_not_the_step_of_its_daemons(name: str) -> None:
    place = detect(recorded(name, MASTER_ADDR="n1", MASTER_PORT="29600"))
    assert (place.launcher, place.rank, place.world_size, place.local_rank, place.node_rank) == ("mpi", 3, 4, 1, 1)
    assert place.rendezvous is not None
    assert (place.rendezvous.host, place.rendezvous.ports) == ("n1", (29600,))


def test_the_environment_is_not_changed() -> None:
    environ = recorded("srun_in_batch_2")
    detect(environ)
    assert environ == recorded("srun_in_batch_2")
