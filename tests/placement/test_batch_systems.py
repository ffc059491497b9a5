"""A job of LSF, PBS or Grid Engine: its script is a world of one, and hears of machines that it leaves unused."""

from __future__ import annotations

from pathlib import Path

import pytest

from allstep.placement import detect
from tests.placement.recorded import recorded

SEVERAL = {
    "lsf": {"LSB_JOBID": "7", "LSB_MCPU_HOSTS": "n1 4 n2 4 n3 2"},
    "grid engine": {"JOB_ID": "7", "SGE_TASK_ID": "undefined", "NHOSTS": "3", "NSLOTS": "10"},
    "pbs": {"PBS_JOBID": "7"},
}


@pytest.mark.parametrize("name", SEVERAL)
def test_a_script_on_one_of_several_machines_trains_alone_with_a_warning(name: str, tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("n1\nn1\nn2\nn2\nn3\n")
    place = detect(SEVERAL[name] | {"PBS_NODEFILE": str(tmp_path / "nodes")})
    assert (place.launcher, place.world_size, place.run_id) == ("alone", 1, "7")
    (warning,) = place.warnings
    assert "the job has 3 machines, but this process trains alone" in warning
    assert "launch/hosts.sh" in warning


@pytest.mark.parametrize(
    "environ",
    [
        {"LSB_JOBID": "7"},
        {"LSB_JOBID": "7", "LSB_MCPU_HOSTS": ""},
        {"PBS_JOBID": "7", "PBS_NODEFILE": "/not/there"},
        {"SGE_TASK_ID": "1", "NHOSTS": "many"},
        {"NHOSTS": "3", "JOB_ID": "7"},
    ],
)
def test_what_says_nothing_of_machines_is_one_of_them(environ: dict[str, str]) -> None:
    assert detect(environ).warnings == ()


def test_ranks_that_a_script_starts_are_their_launchers() -> None:
    assert detect(recorded("torchrun_1", **SEVERAL["lsf"])).launcher == "torchrun"
    assert detect(recorded("openmpi_0", **SEVERAL["grid engine"])).launcher == "mpi"
