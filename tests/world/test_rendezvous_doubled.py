"""Row 26 of the fault matrix without a supervisor: two processes of one rank, and what each process of the job says."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from allstep.launch.environment import ReservedPort
from tests.faults.rehearsal import by_hand
from tests.jobs.launchers import place
from tests.world.frozen_store import served_store

pytestmark = pytest.mark.slow

RANK_1_TWICE, RANK_0_TWICE = (0, 1, 1), (0, 0, 1)

AT_ONCE = 120.0
"""Seconds for processes to start and to end on a busy machine, far below the time that ranks give each other."""


def on_nodes(rank: int, port: int) -> dict[str, str]:
    """The place of a rank that is alone on its node, of three."""
    alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank), "GROUP_WORLD_SIZE": "3"}
    return place(rank, 3, port, **alone)


def check(folder: Path, places: list[dict[str, str]]) -> None:
    """All say the same, at once, and it names both processes of the rank that comes twice."""
    jobs = by_hand(folder, "meets.py", *places)
    said = {job.text.strip().splitlines()[-1] for job in jobs}
    assert len(said) == 1, said
    ranks = [each["RANK"] for each in places]
    twice = next(rank for rank in ranks if ranks.count(rank) == 2)
    (text,) = said
    assert f"two processes are rank {twice}:" in text
    for job, rank in zip(jobs, ranks, strict=True):
        assert job.code == 1
        assert job.ended - job.began < AT_ONCE
        if rank == twice:
            assert f"process {job.pid} on {socket.gethostname()}" in text


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", [RANK_1_TWICE, RANK_0_TWICE])
def test_all_ranks_of_a_node_hear_which_two_processes_are_one_rank(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    with ReservedPort(shared=True) as reserved:
        check(tmp_path, [place(rank, 3, reserved.port) for rank in ranks])


@pytest.mark.parametrize("ranks", [pytest.param(RANK_1_TWICE, marks=pytest.mark.nightly), RANK_0_TWICE])
@pytest.mark.nightly
def test_ranks_of_several_nodes_hear_it_too(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    with ReservedPort(shared=True) as reserved:
        check(tmp_path, [on_nodes(rank, reserved.port) for rank in ranks])


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", [RANK_1_TWICE, RANK_0_TWICE])
def test_ranks_at_a_launchers_store_hear_it_too(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    with served_store() as (_, port):
        agent = {
            "TORCHELASTIC_RUN_ID": "doubled",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
        }
        check(tmp_path, [place(rank, 3, port, **agent) for rank in ranks])
