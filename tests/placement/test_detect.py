"""Which launcher wins, what is derived, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allstep.errors import PlacementError
from allstep.launch.environment import worker_environment
from allstep.placement import Placement, detect
from tests.placement.recorded import all_names, recorded

BY_HAND = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29600"}
ALLSTEP = worker_environment(
    rank=3,
    world_size=4,
    local_rank=1,
    local_world_size=2,
    node_rank=1,
    nodes=2,
    master_addr="head",
    master_port=29600,
    run_id="run-1",
    attempt=2,
)
XLA = {
    "PJRT_DEVICE": "TPU",
    "PJRT_LOCAL_PROCESS_RANK": "1",
    "PJRT_LOCAL_PROCESS_COUNT": "4",
    "CLOUD_TPU_TASK_ID": "5",
    "TPU_PROCESS_ADDRESSES": ",".join(f"tpu-{host}:{port}" for host in (0, 1) for port in range(8476, 8480)),
}


def numbers(place: Placement) -> tuple[int, ...]:
    return (place.rank, place.world_size, place.local_rank, place.local_world_size, place.node_rank, place.nodes)


def refusal(environ: dict[str, str]) -> PlacementError:
    with pytest.raises(PlacementError) as caught:
        detect(environ)
    return caught.value


def place_or_refusal(environ: dict[str, str]) -> Placement | PlacementError:
    try:
        return detect(environ)
    except PlacementError as error:
        return error


def test_placement_is_found_without_importing_torch() -> None:
    code = "import os, sys; from allstep.placement import detect; detect(os.environ); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env={}, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_no_launcher_is_a_world_of_one() -> None:
    assert detect({"PATH": "/bin", "MASTER_PORT": "x"}) == Placement(launcher="alone")


def test_allstep_run_sets_what_detect_reads() -> None:
    place = detect(ALLSTEP)
    assert (place.launcher, place.run_id, place.attempt) == ("allstep", "run-1", 2)
    assert numbers(place) == (3, 4, 1, 2, 1, 2)
    assert place.rendezvous is not None
    assert (place.rendezvous.host, place.rendezvous.ports, place.rendezvous.agent_store) == ("head", (29600,), False)


def test_allstep_run_inside_a_step_is_allstep() -> None:
    assert numbers(detect(recorded("srun_in_batch_2", **ALLSTEP))) == (3, 4, 1, 2, 1, 2)
    assert detect(recorded("srun_in_batch_2", **ALLSTEP)).launcher == "allstep"


def test_torchrun_restart_count_is_the_attempt() -> None:
    assert detect(recorded("torchrun_1", TORCHELASTIC_RESTART_COUNT="3")).attempt == 3


def test_torchrun_without_a_run_id_is_named_after_its_meeting_place() -> None:
    assert detect(recorded("torchrun_1", TORCHELASTIC_RUN_ID="none", MASTER_PORT="29500")).run_id == "localhost:29500"


class TestSlurm:
    def test_ports_differ_by_job_step_and_attempt(self) -> None:
        changes: tuple[dict[str, str], ...] = (
            {},
            {"SLURM_JOB_ID": "8"},
            {"SLURM_STEP_ID": "1"},
            {"SLURM_RESTART_COUNT": "1"},
        )
        places = [detect(recorded("srun_in_batch_0", **change)) for change in changes]
        assert len({place.rendezvous.ports for place in places if place.rendezvous}) == 4

    def test_one_node_meets_on_the_loopback(self) -> None:
        one_node = {"SLURM_STEP_NODELIST": "n2", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}
        two_tasks = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GTIDS": "0,1"}
        place = detect(recorded("srun_in_batch_1", **one_node, **two_tasks))
        assert place.rendezvous is not None
        assert place.rendezvous.host == "127.0.0.1"

    def test_master_address_and_port_override_what_is_derived(self) -> None:
        place = detect(recorded("srun_in_batch_0", MASTER_ADDR="n1-fast", MASTER_PORT="29600"))
        assert place.rendezvous is not None
        assert (place.rendezvous.host, place.rendezvous.ports) == ("n1-fast", (29600,))

    def test_host_is_the_first_of_a_compressed_list(self) -> None:
        nodes = "rack[1-2]-n[03-04]"
        counts = {"SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"}
        place = detect(
            recorded("srun_in_batch_2", SLURM_STEP_NODELIST=nodes, SLURM_JOB_NODELIST=nodes, **counts, SLURM_NODEID="1")
        )
        assert place.rendezvous is not None
        assert place.rendezvous.host == "rack1-n03"
        assert numbers(place) == (2, 8, 0, 2, 1, 4)

    def test_restarted_batch_script_knows_its_attempt(self) -> None:
        assert detect(recorded("slurm_batch_script", SLURM_RESTART_COUNT="2")).attempt == 2


class TestByHand:
    @pytest.mark.parametrize(
        ("more", "expected"),
        [
            ({}, (1, 4, 1, 4, 0, 1)),
            ({"MASTER_ADDR": "localhost"}, (1, 4, 1, 4, 0, 1)),
            ({"MASTER_ADDR": "head", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (1, 4, 1, 2, 0, 2)),
            ({"MASTER_ADDR": "head", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, (1, 4, 0, 1, 1, 4)),
            (
                {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"},
                (1, 4, 0, 3, 1, 2),
            ),
        ],
    )
    def test_place(self, more: dict[str, str], expected: tuple[int, ...]) -> None:
        assert numbers(detect(BY_HAND | more)) == expected

    def test_world_of_one_needs_no_meeting_place(self) -> None:
        place = detect({"RANK": "0", "WORLD_SIZE": "1"})
        assert (place.world_size, place.rendezvous) == (1, None)

    def test_what_is_missing_comes_from_a_step_that_agrees(self) -> None:
        environ = recorded("srun_uneven_2", RANK="2", WORLD_SIZE="3", MASTER_ADDR="n1", MASTER_PORT="29600")
        assert numbers(detect(environ)) == (2, 3, 0, 1, 1, 2)

    def test_more_ranks_than_tasks_is_a_launcher_of_its_own(self) -> None:
        ranks = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
        environ = recorded("srun_nested_1", MASTER_ADDR="n1", MASTER_PORT="29600", **ranks)
        assert numbers(detect(environ)) == (5, 8, 1, 4, 1, 2)

    @pytest.mark.parametrize(("stale", "variable"), [("1", "WORLD_SIZE"), ("4", "RANK")])
    def test_stale_variables_that_every_task_inherited_are_refused(self, stale: str, variable: str) -> None:
        meeting = {"MASTER_ADDR": "n1", "MASTER_PORT": "29600"}
        error = refusal(recorded("srun_in_batch_3", RANK="0", WORLD_SIZE=stale, **meeting))
        assert error.variable == variable
        assert "slurm variables say rank 3 of 4" in str(error)

    def test_ranks_on_unknown_nodes_are_asked_for(self) -> None:
        assert refusal(BY_HAND | {"MASTER_ADDR": "head"}).variable == "LOCAL_RANK"
        assert refusal(BY_HAND | {"MASTER_ADDR": "head", "LOCAL_RANK": "0"}).variable == "LOCAL_WORLD_SIZE"
        uneven = {"MASTER_ADDR": "head", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}
        assert refusal(BY_HAND | uneven).variable == "GROUP_RANK"


class TestMpi:
    def test_without_slurm_a_pmi_rank_needs_its_local_rank(self) -> None:
        assert refusal({"PMI_RANK": "1", "PMI_SIZE": "2"}).variable == "MPI_LOCALNRANKS"
        assert detect({"PMI_RANK": "0", "PMI_SIZE": "1"}).launcher == "mpi"

    def test_cray_names(self) -> None:
        local = {"PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}
        assert numbers(detect({"PMI_RANK": "1", "PMI_SIZE": "2", **local})) == (1, 2, 1, 2, 0, 1)

    @pytest.mark.parametrize(
        ("rank", "local_rank", "node_rank", "warned"), [("2", "0", 1, 0), ("2", "1", 0, 0), ("1", "0", 1, 0)]
    )
    def test_node_rank_by_slot_and_by_node(self, rank: str, local_rank: str, node_rank: int, warned: int) -> None:
        place = detect(
            recorded(
                "salloc_openmpi_3",
                OMPI_COMM_WORLD_RANK=rank,
                OMPI_COMM_WORLD_LOCAL_RANK=local_rank,
                MASTER_ADDR="n1",
                MASTER_PORT="29600",
            )
        )
        assert (place.node_rank, place.nodes, len(place.warnings)) == (node_rank, 2, warned)

    def test_uneven_nodes_are_warned_about(self) -> None:
        ranks = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
        place = detect(recorded("openmpi_0", **ranks, MASTER_ADDR="n1", MASTER_PORT="29600"))
        assert numbers(place) == (2, 3, 1, 2, 1, 2)
        assert "node rank is a guess" in place.warnings[0]

    def test_jobs_on_one_machine_derive_different_ports(self) -> None:
        first, second = detect(recorded("openmpi_0")), detect(recorded("openmpi_0", PMIX_NAMESPACE="1"))
        assert first.rendezvous != second.rendezvous


class TestXla:
    def test_a_process_of_a_pod(self) -> None:
        place = detect(XLA)
        assert place.launcher == "xla"
        assert numbers(place) == (5, 8, 1, 4, 1, 2)
        assert place.rendezvous is not None
        assert (place.rendezvous.host, place.rendezvous.ports) == ("tpu-0", (12355,))

    def test_a_process_of_one_host(self) -> None:
        local = {"PJRT_DEVICE": "NEURON", "PJRT_LOCAL_PROCESS_RANK": "1", "PJRT_LOCAL_PROCESS_COUNT": "2"}
        assert numbers(detect(local)) == (1, 2, 1, 2, 0, 1)

    def test_under_torchrun_it_is_torchruns(self) -> None:
        assert detect(recorded("torchrun_1", **XLA)).launcher == "torchrun"

    def test_a_pod_host_by_itself_trains_alone_and_says_so(self) -> None:
        place = detect({"PJRT_DEVICE": "TPU", "TPU_WORKER_HOSTNAMES": "tpu-0,tpu-1", "TPU_WORKER_ID": "1"})
        assert (place.launcher, place.world_size) == ("alone", 1)
        assert "one of 2 of a TPU pod" in place.warnings[0]

    def test_a_device_alone_is_no_launcher(self) -> None:
        assert detect({"PJRT_DEVICE": "CPU"}) == Placement(launcher="alone")


REFUSED = [
    # environment, changes, the variable at fault
    ("torchrun_1", {"RANK": ""}, "RANK"),
    ("torchrun_1", {"RANK": "x"}, "RANK"),
    ("torchrun_1", {"RANK": " 1"}, "RANK"),
    ("torchrun_1", {"RANK": "-1"}, "RANK"),
    ("torchrun_1", {"RANK": "1.0"}, "RANK"),
    ("torchrun_1", {"RANK": "\u0661"}, "RANK"),
    ("torchrun_1", {"RANK": "2"}, "RANK"),
    ("torchrun_1", {"RANK": None}, "RANK"),
    ("torchrun_1", {"WORLD_SIZE": "0"}, "WORLD_SIZE"),
    ("torchrun_1", {"WORLD_SIZE": None}, "WORLD_SIZE"),
    ("torchrun_1", {"LOCAL_RANK": "2"}, "LOCAL_RANK"),
    ("torchrun_1", {"LOCAL_RANK": "0"}, "LOCAL_RANK"),
    ("torchrun_1", {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE"),
    ("torchrun_0", {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_WORLD_SIZE"),
    ("srun_torchrun_3", {"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE"),
    ("torchrun_1", {"GROUP_RANK": "1"}, "GROUP_RANK"),
    ("torchrun_1", {"GROUP_WORLD_SIZE": "0"}, "GROUP_WORLD_SIZE"),
    ("torchrun_1", {"MASTER_ADDR": None}, "MASTER_ADDR"),
    ("torchrun_1", {"MASTER_ADDR": ""}, "MASTER_ADDR"),
    ("torchrun_1", {"MASTER_PORT": "99999"}, "MASTER_PORT"),
    ("torchrun_1", {"MASTER_PORT": "0"}, "MASTER_PORT"),
    ("torchrun_1", {"TORCHELASTIC_RUN_ID": ""}, "TORCHELASTIC_RUN_ID"),
    ("torchrun_1", {"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT"),
    ("torchrun_1", {"TORCHELASTIC_USE_AGENT_STORE": "yes"}, "TORCHELASTIC_USE_AGENT_STORE"),
    ("torchrun_1", {"ALLSTEP_RUN_ID": "run-1", "ALLSTEP_ATTEMPT": "0"}, "ALLSTEP_RUN_ID"),
    ("srun_in_batch_3", {"SLURM_PROCID": None}, "SLURM_PROCID"),
    ("srun_in_batch_3", {"SLURM_PROCID": "4"}, "SLURM_PROCID"),
    ("srun_in_batch_3", {"SLURM_LOCALID": "2"}, "SLURM_LOCALID"),
    ("srun_in_batch_3", {"SLURM_NODEID": "2"}, "SLURM_NODEID"),
    ("srun_in_batch_3", {"SLURM_JOB_ID": None}, "SLURM_JOB_ID"),
    ("srun_in_batch_3", {"SLURM_STEP_ID": "x"}, "SLURM_STEP_ID"),
    ("srun_in_batch_3", {"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS"),
    ("srun_in_batch_3", {"SLURM_STEP_NUM_TASKS": "5"}, "SLURM_STEP_TASKS_PER_NODE"),
    ("srun_in_batch_3", {"SLURM_STEP_NUM_TASKS": None}, "SLURM_STEP_NUM_TASKS"),
    ("srun_in_batch_3", {"SLURM_STEP_TASKS_PER_NODE": "2(x"}, "SLURM_STEP_TASKS_PER_NODE"),
    ("srun_in_batch_3", {"SLURM_STEP_TASKS_PER_NODE": "4"}, "SLURM_STEP_TASKS_PER_NODE"),
    ("srun_in_batch_3", {"SLURM_STEP_NODELIST": "n[1-"}, "SLURM_STEP_NODELIST"),
    ("srun_in_batch_3", {"SLURM_STEP_NODELIST": "n[1,3]"}, "SLURM_STEP_NODELIST"),
    ("srun_in_batch_3", {"SLURM_STEP_NUM_NODES": "3"}, "SLURM_STEP_NUM_NODES"),
    ("srun_in_batch_3", {"SLURM_JOB_NODELIST": "n[1-"}, "SLURM_JOB_NODELIST"),
    ("srun_in_batch_3", {"SLURM_GTIDS": "3"}, "SLURM_STEP_TASKS_PER_NODE"),
    ("srun_in_batch_3", {"SLURM_GTIDS": "0,1"}, "SLURM_STEP_TASKS_PER_NODE"),
    ("srun_in_batch_3", {"SLURM_RESTART_COUNT": "x"}, "SLURM_RESTART_COUNT"),
    ("srun_in_batch_3", {"WORLD_SIZE": "2"}, "WORLD_SIZE"),
    ("srun_in_batch_3", {"LOCAL_RANK": "0"}, "LOCAL_RANK"),
    ("srun_in_batch_3", {"MASTER_PORT": "99999"}, "MASTER_PORT"),
    ("srun_in_batch_3", {"RANK": "3"}, "WORLD_SIZE"),
    ("slurm_batch_script", {"SLURM_NTASKS": "x"}, "SLURM_NTASKS"),
    ("slurm_batch_script", {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID"),
    ("openmpi_1", {"OMPI_COMM_WORLD_SIZE": None}, "OMPI_COMM_WORLD_SIZE"),
    ("openmpi_1", {"OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_RANK"),
    ("openmpi_1", {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("openmpi_1", {"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("openmpi_1", {"WORLD_SIZE": "4"}, "WORLD_SIZE"),
    ("openmpi_1", {"MASTER_ADDR": "n1"}, "MASTER_PORT"),
    ("hydra_1", {"PMI_RANK": None}, "PMI_RANK"),
    ("hydra_1", {"MPI_LOCALRANKID": "x"}, "MPI_LOCALRANKID"),
]


@pytest.mark.parametrize(("name", "changes", "variable"), REFUSED)
def test_a_broken_environment_is_refused_by_variable_and_value(
    name: str, changes: dict[str, str | None], variable: str
) -> None:
    environ = recorded(name, **changes)
    error = refusal(environ)
    assert (error.variable, error.value) == (variable, environ.get(variable))
    assert variable in str(error)
    assert repr(environ[variable]) in str(error) if variable in environ else "is not set" in str(error)


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "RANK"),
        ({"RANK": "5", "WORLD_SIZE": "4"}, "RANK"),
        ({"RANK": "", "WORLD_SIZE": "4"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}, "MASTER_PORT"),
        (BY_HAND | {"LOCAL_RANK": "4"}, "LOCAL_RANK"),
        (BY_HAND | {"LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK"),
        (BY_HAND | {"GROUP_RANK": "0"}, "GROUP_WORLD_SIZE"),
        (ALLSTEP | {"ALLSTEP_ATTEMPT": "1"}, "ALLSTEP_ATTEMPT"),
        (ALLSTEP | {"ALLSTEP_RUN_ID": ""}, "ALLSTEP_RUN_ID"),
        ({"ALLSTEP_RUN_ID": "run-1", "ALLSTEP_ATTEMPT": "0"}, "WORLD_SIZE"),
        (XLA | {"CLOUD_TPU_TASK_ID": "8"}, "CLOUD_TPU_TASK_ID"),
        (XLA | {"CLOUD_TPU_TASK_ID": "4"}, "CLOUD_TPU_TASK_ID"),
        (XLA | {"PJRT_LOCAL_PROCESS_COUNT": "3"}, "TPU_PROCESS_ADDRESSES"),
        (XLA | {"TPU_PROCESS_ADDRESSES": ",".join("abcdefgh")}, "TPU_PROCESS_ADDRESSES"),
        ({"PJRT_LOCAL_PROCESS_RANK": "0", "PJRT_LOCAL_PROCESS_COUNT": "1"}, "PJRT_DEVICE"),
    ],
)
def test_a_broken_set_is_refused_by_variable(environ: dict[str, str], variable: str) -> None:
    assert refusal(environ).variable == variable


VALUES = st.none() | st.sampled_from(["", "0", "1", "2", "5", "n1", "2(x2)", "n[1-2]", "4294967290"])
TEXTS = st.text("0123456789-[](),x n", max_size=8)


@given(
    name=st.sampled_from(all_names()),
    over=st.sampled_from([{}, BY_HAND, ALLSTEP, XLA]),
    changes=st.lists(st.tuples(st.integers(0, 99), VALUES | TEXTS), max_size=4),
)
def test_any_environment_gives_a_place_or_a_placement_error(
    name: str, over: dict[str, str], changes: list[tuple[int, str | None]]
) -> None:
    environ = recorded(name) | over
    variables = sorted(environ)
    for position, value in changes:
        variable = variables[position % len(variables)]
        environ.pop(variable, None)
        if value is not None:
            environ[variable] = value
    outcome = place_or_refusal(environ)
    if isinstance(outcome, PlacementError):
        assert outcome.variable in str(outcome)
        assert outcome.value == environ.get(outcome.variable)
    else:
        assert outcome.world_size == 1 or outcome.rendezvous is not None
