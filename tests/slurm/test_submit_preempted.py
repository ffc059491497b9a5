"""Twenty jobs of `allstep submit`, each ended at random moments in one of SLURM's ways, at its size or at others.

What is compared: the parameters at the end with those of the same script where nobody stops it. At the same size they
are equal to the last bit. Where a job went on at another size the sums over ranks were added in another order, so they
are equal to 1e-12 of doubles; a sample that is missing, twice or of another weight shows from 1e-4 on.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from allstep.placement.slurm import expand_hosts
from tests.slurm.cluster import Cluster
from tests.slurm.test_submit import TRAIN, Submitted, submitted, unbroken

__all__ = ["submitted"]

pytestmark = [
    *(pytest.mark.slurm, pytest.mark.slow, pytest.mark.nightly, pytest.mark.xdist_group("slurm")),
    pytest.mark.timeout(900),
]

# Without dropout, whose masks are of a rank's own batch, so that the size is nothing but the order of sums.
TRAIN_AT_ANY_SIZE = TRAIN.replace("torch.nn.Dropout(0.2)", "torch.nn.Tanh()").replace(
    "with allstep.init", "torch.set_default_dtype(torch.float64)\nwith allstep.init"
)
EPOCHS = 4
ITERATIONS = 12 * EPOCHS


class Ending:
    """One way in which SLURM ends a job's start, and what then brings the job back.

    Args:
        job: which job.
        other_size: it comes back on one node after two, and the other way round.
    """

    def __init__(self, job: Submitted, other_size: bool) -> None:
        self.job, self.cluster, self.other_size = job, job.cluster, other_size

    def signal(self) -> None:
        """`scancel --signal`."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.job.number)
        self._come_back()

    def requeue(self) -> None:
        """`scontrol requeue`."""
        self.cluster.run("scontrol", "requeue", self.job.number)
        self._come_back()

    def time_limit(self) -> None:
        """The time is up within the minute."""
        minutes = int(self._ask("%M").split(":")[-2]) + 1
        self.cluster.run("scontrol", "update", f"job={self.job.number}", f"TimeLimit={minutes}")
        self._come_back("TimeLimit=60")

    def death_of_first(self) -> None:
        """slurmd on the node that has the batch script is killed; what it started runs on."""
        self._death(self._nodes()[0])

    def death_of_last(self) -> None:
        """slurmd on the other node, or on the only one, is killed."""
        self._death(self._nodes()[-1])

    def _death(self, node: str) -> None:
        self.cluster.kill(f"slurmd-{node}")
        goes_on_at_once = self.other_size and self._next_nodes() == 1
        try:
            self.job.until(lambda: self.job.state() != "RUNNING")
            if goes_on_at_once:  # where slurmd lives, while what the other started may still run
                self._come_back()
                self.job.until(lambda: self.job.state() in ("RUNNING", ""))
        finally:
            self.cluster.start(f"slurmd-{node}")
        if not goes_on_at_once:  # a slurmd that has just come back may still have the start that it was killed in
            self._come_back(seconds=20)

    def _ask(self, what: str) -> str:
        asked = self.cluster.run("squeue", "--noheader", f"--format={what}", f"--jobs={self.job.number}")
        return asked.stdout.strip()

    def _nodes(self) -> list[str]:
        return list(expand_hosts(self._ask("%N")))

    def _next_nodes(self) -> int:
        return 1 if len(self.job.nodes()) % 2 else 2

    def _come_back(self, *changes: str, seconds: int = 2) -> None:
        number = self.job.number
        self.job.until(lambda: self.job.state() in ("PENDING", ""))
        if not self.job.state():
            return
        if self.other_size:
            changes = (*changes, f"NumNodes={self._next_nodes()}-{self._next_nodes()}")
        if changes:
            self.cluster.run("scontrol", "update", f"job={number}", *changes)
        self.job.start_again(seconds)


ENDINGS: dict[str, Callable[[Ending], None]] = {
    "time_limit": Ending.time_limit,
    "signal": Ending.signal,
    "requeue": Ending.requeue,
    "death_of_first": Ending.death_of_first,
    "death_of_last": Ending.death_of_last,
}


@pytest.fixture(scope="module")
def never_stopped(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """The parameters of the script on two ranks."""
    project = tmp_path_factory.mktemp("never_stopped")
    (project / "train.py").write_text(TRAIN_AT_ANY_SIZE)
    return unbroken(Submitted(cluster, project), EPOCHS)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("other_size", [False, True], ids=["same_size", "other_size"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_job_that_is_preempted_ends_as_one_that_was_not(
    ending: str, other_size: bool, seed: int, submitted: Submitted, never_stopped: list[torch.Tensor]
) -> None:
    job = submitted
    chance = random.Random(f"{ending} {other_size} {seed}")
    (job.project / "train.py").write_text(TRAIN_AT_ANY_SIZE)
    # SLURM's notice comes up to a minute after the limit was set, and it takes 20 seconds to miss a slurmd.
    pace = {"signal": "0.2", "requeue": "0.2", "time_limit": "2"}.get(ending, "1")
    job.submit("--nodes=1-2" if other_size else "--nodes=2", "--nproc=1", "--time=60", "train.py", str(EPOCHS), pace)
    for start in (1, 2):
        job.until(lambda start=start: len(job.nodes()) >= start or job.has_finished())
        # From the first moments of a start on; a job that used up its time before its first step would end with 93.
        iterations = chance.randrange(1 if ending == "time_limit" else 0, ITERATIONS // 4)
        said = job.said.count("iteration ") + iterations * job.nodes()[-1]
        job.until(lambda said=said: job.said.count("iteration ") >= said or job.has_finished())
        if job.has_finished():
            break
        ENDINGS[ending](Ending(job, other_size))
    job.until(job.has_finished)
    assert len(job.nodes()) >= 2, job.said
    if other_size:
        assert set(job.nodes()) == {1, 2}
    ended = torch.load(job.project / "out.pt")
    if other_size:
        for mine, other in zip(ended, never_stopped, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    else:
        assert all(map(torch.equal, ended, never_stopped))
