"""Jobs of `allstep submit` that are ended in every way, at other sizes and as arrays, on a real SLURM."""

from __future__ import annotations

import re

import pytest
import torch

from tests.slurm.test_submit import Submitted, submitted, unbroken

__all__ = ["submitted"]

pytestmark = [
    *(pytest.mark.slurm, pytest.mark.slow, pytest.mark.nightly, pytest.mark.xdist_group("slurm")),
    pytest.mark.timeout(600),
]


def ends_as_unbroken(job: Submitted, epochs: int, nproc: int = 2) -> None:
    assert all(map(torch.equal, torch.load(job.project / "out.pt"), unbroken(job, epochs, nproc)))


def test_the_end_of_its_time_requeues_a_job_until_it_has_finished(submitted: Submitted) -> None:
    # 72 iterations of a second do not fit into a minute. SLURM knows limits of whole minutes only.
    submitted.submit("--time=1", "--margin=10", "--nodes=2", "--nproc=1", "train.py", "6", "1")
    submitted.until(lambda: "of the job: finished" in submitted.said, seconds=400)
    assert submitted.said.count("the run is told to save and stop") >= 1
    assert len(submitted.record()) >= 4
    ends_as_unbroken(submitted, 6)


def test_a_task_for_each_rank_is_stopped_and_goes_on(submitted: Submitted) -> None:
    submitted.submit("--nodes=2", "--tasks-per-node=1", "train.py", "3", "0.1")
    submitted.until_said("iteration 4")
    submitted.cluster.run("scancel", "--batch", "--signal=USR1", submitted.number)
    submitted.until_said("the job is put back into its queue")
    submitted.start_again()
    submitted.until_said("of the job: finished")
    ends_as_unbroken(submitted, 3)


def test_a_job_that_slurm_requeues_goes_on(submitted: Submitted) -> None:
    submitted.submit("--nodes=2", "--nproc=1", "train.py", "4", "0.2")
    submitted.until_said("iteration 12")
    submitted.cluster.run("scontrol", "requeue", submitted.number)
    submitted.start_again()
    submitted.until_said("of the job: finished")
    assert submitted.record()[-2]["saved"] >= 10
    ends_as_unbroken(submitted, 4)


def test_a_chain_goes_on_in_a_new_job(submitted: Submitted) -> None:
    submitted.submit("--chain", "--nodes=2", "--nproc=1", "train.py", "3", "0.1")
    first = submitted.number
    submitted.until_said("iteration 4")
    submitted.cluster.run("scancel", "--batch", "--signal=USR1", first)
    submitted.until_said("stopped; goes on in job")
    submitted.until_said("of the job: finished")
    assert [each["job"] for each in submitted.record() if "job" in each][1] != first
    ends_as_unbroken(submitted, 3)


def test_a_job_that_was_cancelled_does_not_come_back(submitted: Submitted) -> None:
    submitted.submit("--nodes=2", "--nproc=1", "train.py", "9", "0.2")
    submitted.until_said("iteration 4")
    submitted.cluster.run("scancel", submitted.number)
    submitted.until(lambda: submitted.state() == "")
    assert "put back" not in submitted.said


def test_a_requeued_job_takes_the_nodes_that_are_there(submitted: Submitted) -> None:
    submitted.submit("--nodes=1-2", "--nproc=1", "train.py", "3", "0.1")
    submitted.until_said("iteration 4")
    submitted.cluster.run("scancel", "--batch", "--signal=USR1", submitted.number)
    submitted.cluster.run("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    try:
        submitted.until_said("the job is put back into its queue")
        submitted.start_again()
        submitted.until_said("of the job: finished")
    finally:
        submitted.cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    assert [each["nodes"] for each in submitted.record() if "nodes" in each] == [2, 1]
    said = [int(each) for each in re.findall(r"iteration (\d+)$", submitted.said, re.M)]
    assert sorted(set(said)) == list(range(1, 37))
    one_by_one = zip(torch.load(submitted.project / "out.pt"), unbroken(submitted, 3), strict=True)
    assert all(torch.allclose(mine, other, atol=1e-5) for mine, other in one_by_one)


def test_what_slurm_refuses_is_one_line_and_leaves_no_folder(submitted: Submitted) -> None:
    done = submitted.submit("--partition=nowhere", "train.py", "1", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "SLURM refused the job" in done.stderr
    assert "invalid partition" in done.stderr.lower()
    assert not (submitted.project / "runs" / "job").exists()


def test_paths_and_arguments_reach_the_script_as_they_were_given(submitted: Submitted) -> None:
    folder = submitted.project / "it's a “folder”"
    awkward = ["a b", "it's", 'say "hi"', "$HOME `id` \\", "two\nlines", "", "*"]
    (submitted.project / "train.py").write_text("import sys; print(repr(sys.argv[1:]), flush=True)\n")
    done = submitted.submit(f"--runs={folder}", "--nproc=1", "train.py", *awkward)
    assert done.returncode == 0, done.stderr
    log = folder / "job" / f"slurm-{submitted.number}.log"
    submitted.until(lambda: log.exists() and "finished" in log.read_text())
    assert repr(awkward) in log.read_text()


def test_a_job_has_of_its_shell_what_was_named_and_no_file_has_a_secret(submitted: Submitted) -> None:
    show = "import os; print([os.environ.get(name) for name in ('API_TOKEN', 'MINE', 'OTHER')], flush=True)\n"
    (submitted.project / "train.py").write_text(show)
    env = {"API_TOKEN": "s3cr3t-t0k3n", "MINE": "a b", "OTHER": "x"}
    submitted.submit("--env=API_TOKEN", "--env=MINE", "--nproc=1", "train.py", **env)
    submitted.until_said("of the job: finished")
    assert "['s3cr3t-t0k3n', 'a b', None]" in submitted.said
    written = [path for path in submitted.project.rglob("*") if path.is_file() and "slurm-" not in path.name]
    assert [path for path in written if "s3cr3t-t0k3n" in path.read_text() and "attempt_" not in str(path)] == []
