"""Jobs of `allstep submit` when something of SLURM or of the job fails, and many of them at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.slurm.cluster import Cluster
from tests.slurm.test_submit import Submitted, submitted
from tests.slurm.test_submit_ends import ends_as_unbroken

__all__ = ["submitted"]

pytestmark = [
    *(pytest.mark.slurm, pytest.mark.slow, pytest.mark.nightly, pytest.mark.xdist_group("slurm")),
    pytest.mark.timeout(600),
]

FAIL = """
import os, sys, time
print("begun", os.environ.get("SLURM_PROCID"), flush=True)
if os.environ["RANK" if "RANK" in os.environ else "SLURM_PROCID"] == "1":
    sys.exit(7)
time.sleep(60)
"""


@pytest.mark.parametrize(("how", "code"), [(("--nproc=1",), 7), (("--tasks-per-node=1",), None)])
def test_a_step_that_fails_ends_the_job_and_is_not_requeued(
    how: tuple[str, ...], code: int | None, submitted: Submitted
) -> None:
    (submitted.project / "train.py").write_text(FAIL)
    submitted.submit("--nodes=2", *how, "train.py")
    submitted.until_said("of the job: failed with exit code")
    submitted.until(lambda: submitted.state() == "")
    end = submitted.record()[-1]
    # srun gives the largest code of its tasks, which can be that of a peer that it ended.
    assert end["code"] == code if code is not None else end["code"] > 0
    assert "JobState=FAILED" in submitted.cluster.run("scontrol", "show", "job", submitted.number).stdout
    assert "put back" not in submitted.said


def test_a_job_whose_node_goes_down_goes_on(submitted: Submitted, cluster: Cluster) -> None:
    submitted.submit("--nodes=1-2", "--nproc=1", "train.py", "4", "0.3")
    submitted.until_said("iteration 12\n")
    try:
        cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
        submitted.start_again()
        submitted.until(submitted.has_finished)
    finally:
        cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    assert submitted.nodes() in ([2, 1], [2, 2])  # the node reports itself well again, sooner or later
    assert next(each for each in reversed(submitted.record()) if "nodes" in each)["saved"] >= 10
    reached = [int(each) for each in re.findall(r"iteration (\d+)$", submitted.said, re.M)]
    assert set(reached) == set(range(1, 49))


def test_a_controller_that_restarts_while_a_job_runs_costs_nothing(submitted: Submitted, cluster: Cluster) -> None:
    submitted.submit("--nodes=2", "--nproc=1", "train.py", "3", "0.2")
    submitted.until_said("iteration 5\n")
    cluster.kill("slurmctld")
    submitted.until_said("iteration 9\n")
    cluster.start("slurmctld")
    submitted.until(submitted.has_finished)
    assert submitted.nodes() == [2]
    ends_as_unbroken(submitted, 3)


def test_a_controller_that_is_away_when_a_job_stops_is_waited_for(submitted: Submitted, cluster: Cluster) -> None:
    submitted.submit("--nodes=2", "--nproc=1", "train.py", "3", "0.2")
    submitted.until_said("iteration 5\n")
    cluster.run("scancel", "--batch", "--signal=USR1", submitted.number)
    submitted.until_said("the run is told to save and stop")
    cluster.stop("slurmctld")
    try:
        submitted.until_said("was preempted (exit code 85)")
    finally:
        cluster.start("slurmctld")
    submitted.until_said("the job is put back into its queue")
    submitted.start_again()
    submitted.until(submitted.has_finished)
    assert submitted.nodes() == [2, 2]
    ends_as_unbroken(submitted, 3)


PREEMPTING = """
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{parameters}
PartitionName=DEFAULT GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP
"""


@pytest.mark.parametrize("parameters", ["", "SlurmctldParameters=preempt_send_user_signal"], ids=["sigterm", "sigusr1"])
def test_a_job_that_another_preempts_goes_on_after_it(
    parameters: str, cluster: Cluster, submitted: Submitted, tmp_path: Path
) -> None:
    settings = PREEMPTING.format(parameters=parameters)
    with Cluster(tmp_path / "preempting", nodes=2, configuration=settings) as preempting:
        job = Submitted(preempting, submitted.project)
        job.submit("--nodes=2", "--nproc=1", "--time=60", "--sbatch", "--exclusive", "train.py", "4", "0.2")
        job.until_said("iteration 5\n")
        preempting.run("sbatch", "--partition=urgent", "--exclusive", "--nodes=2", "--wrap=sleep 2")
        job.until_said("the job is put back into its queue")
        job.start_again()
        job.until(job.has_finished)
        assert job.nodes() == [2, 2]
        ends_as_unbroken(job, 4)


def test_an_array_of_eight_at_once_shares_nothing_and_each_member_goes_on(submitted: Submitted) -> None:
    script = (submitted.project / "train.py").read_text()
    show = 'print("port", os.environ["MASTER_PORT"], flush=True) if world.is_main else None\n    model ='
    (submitted.project / "train.py").write_text(script.replace("model =", show, 1))
    submitted.submit("--array=0-7", "--nodes=2", "--nproc=1", str(submitted.project / "train.py"), "3", "0.5")
    submitted.until_said("port ", times=8)
    for member in (2, 5):
        submitted.cluster.run("scancel", "--batch", "--signal=USR1", f"{submitted.number}_{member}")
    submitted.until_said("the job is put back into its queue", times=2)
    submitted.until_said("of the job: finished", times=8)
    ports = re.findall(r"port (\d+)$", submitted.said, re.M)
    assert len(ports) == 10
    assert len(set(ports)) == 10
    assert len(set(re.findall(r"seed (\d+) work", submitted.said))) == 8
    assert set(re.findall(r"work (.+)$", submitted.said, re.M)) == {
        f"{submitted.project}/runs/job-{member}" for member in range(8)
    }
    firsts = [torch.load(submitted.project / f"runs/job-{member}/out.pt")[0] for member in range(8)]
    assert all(not torch.equal(firsts[one], firsts[other]) for one in range(8) for other in range(one))
    records = [submitted.record(f"job-{member}") for member in range(8)]
    assert [len(each) for each in records] == [2, 2, 4, 2, 2, 4, 2, 2]
    assert [each[0]["job"] for each in records] == [f"{submitted.number}_{member}" for member in range(8)]


def test_members_of_a_chain_are_told_of_their_own_time_and_go_on_by_themselves(submitted: Submitted) -> None:
    # A minute, of which half is for the lead at the most: each member is told by the clock, also the one that has the
    # array's own number.
    script = str(submitted.project / "train.py")
    submitted.submit("--chain", "--array=0-1", "--time=1", "--margin=5", "--nproc=1", script, "5", "1")
    submitted.until(lambda: submitted.said.count("of the job: finished") == 2, seconds=400)
    for member in (0, 1):
        ends = [each["what"] for each in submitted.record(f"job-{member}") if "what" in each]
        assert all("goes on in job" in each for each in ends[:-1]), ends
        assert len(ends) >= 2
