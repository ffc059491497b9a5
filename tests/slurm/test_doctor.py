"""`allstep doctor` asks a real SLURM, and a preflight runs in its allocation."""

from __future__ import annotations

from pathlib import Path

import pytest

from allstep.host_checks import Host
from allstep.host_checks.scheduler import check_slurm
from tests.slurm.cluster import Cluster
from tests.slurm.test_launcher import launch

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.nightly, pytest.mark.xdist_group("slurm")]


def test_the_settings_of_a_real_cluster_are_read(cluster: Cluster, tmp_path: Path) -> None:
    found = list(check_slurm(Host(cluster.environ(), tmp_path)))
    assert {finding.verdict for finding in found} == {"warning"}, found
    assert any("KillWait" in finding.text for finding in found), found
    assert any("ProctrackType=proctrack/linuxproc" in finding.text for finding in found), found


def test_a_controller_that_is_not_there_is_bad(cluster: Cluster, tmp_path: Path) -> None:
    environ = cluster.environ()
    config = Path(environ["SLURM_CONF"]).read_text()
    port = next(line for line in config.splitlines() if line.startswith("SlurmctldPort="))
    (tmp_path / "slurm.conf").write_text(config.replace(port, "SlurmctldPort=1"))
    (finding,) = check_slurm(Host(environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}, tmp_path))
    assert finding.verdict == "bad"
    assert "its controller cannot be asked" in finding.text


def test_a_preflight_leaves_out_an_ill_node_of_an_allocation(cluster: Cluster) -> None:
    fault = ("--fault", "rank=1,wrong_sums", "--exclude-ill", "1")
    code, out, said = launch(cluster, "--nproc", "1", "--preflight", *fault, "say.py")
    assert code == 0, said
    assert out.splitlines() == ["['0', '0', '1', '0']"], said
    assert "device 0 (cpu): it computes wrong sums" in said
    assert "preflight: going on without node 1" in said
