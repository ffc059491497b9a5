from __future__ import annotations

from allstep.placement.placement import CANDIDATES, derive_ports

EPHEMERAL = range(32768, 61000)
TAKEN = {6817, 6818, 29400, 29500}


def test_the_same_job_derives_the_same_ports_in_any_process() -> None:
    # Written out, since ranks on different machines have only this function in common.
    assert derive_ports("slurm 7.0 0")[:3] == (20564, 24419, 23357)


def test_candidates_are_different_and_clear_of_ports_in_use_by_others() -> None:
    for job in range(500):
        ports = derive_ports(f"slurm {job}.0 0")
        assert len(set(ports)) == len(ports) == CANDIDATES
        assert not any(port in EPHEMERAL or port in TAKEN or port < 1024 for port in ports)


def test_neighbouring_jobs_spread() -> None:
    first = [derive_ports(f"slurm {job}.0 0")[0] for job in range(100)]
    assert len(set(first)) > 95
