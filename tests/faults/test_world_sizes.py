"""Row 42 of the fault matrix: a run saved at one world size goes on at another: same state, each sample once."""

from __future__ import annotations

import pytest
import torch

from allstep import Events
from allstep.checkpoint import Store
from allstep.coordination import Alone
from allstep.testing import run_ranks
from tests.checkpoint.training import EPOCHS, SAMPLES, Job, Run
from tests.regression import Killed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def begin(world, job, kill):
    run = Run(world, job, kill_at=kill).go()
    return run.taken


def finish(world, job):
    run = Run(world, job)
    loaded = run.checkpoint.resume()
    same = all(
        torch.equal(mine.cpu(), loaded.state["model"][name])
        for name, mine in world.unwrap(run.model).state_dict().items()
    )
    saved = loaded.state["optimizer"]["state"]
    mine = run.optimizer.state_dict()["state"]
    same = same and saved.keys() == mine.keys()
    same = same and all(torch.equal(mine[i]["exp_avg"], saved[i]["exp_avg"]) for i in mine)
    run.engine.run(run.data, max_epochs=EPOCHS)
    state = run.engine.state
    return run.taken, same, loaded.manifest.step, (state.iteration, state.epoch_length), run.scheduler.last_epoch


def global_batches(taken_of_ranks, group_size, epoch_length):
    """Samples by (epoch, number of the optimizer step in it)."""
    batches = {}
    for taken in taken_of_ranks:
        for epoch, iteration, samples in taken:
            step = (iteration - (epoch - 1) * epoch_length - 1) // group_size
            batches.setdefault((epoch, step), []).extend(samples)
    return {key: sorted(samples) for key, samples in batches.items()}


def unbroken(world, job):
    return Run(world, job).go().taken


def check(tmp_path, first, then, most=None, most_then=None, kill=8):
    job = Job(str(tmp_path / "saved"), every=2, most=most)
    per_epoch = len(range(0, SAMPLES, 12))
    taken = run_ranks(begin, first, job, kill)
    after = run_ranks(finish, then, Job(job.folder, every=100, most=most_then))
    whole = run_ranks(unbroken, 1, Job(str(tmp_path / "unbroken"), every=None))
    assert all(same for _, same, _, _, _ in after)
    step = after[0][2]
    length = after[0][3][1]
    assert {each[4] for each in after} == {EPOCHS}
    group = -(-12 // (most_then * then)) if most_then else 1
    old_group = -(-12 // (most * first)) if most else 1
    old_length = per_epoch if old_group == 1 else 4 * old_group + -(-5 // -(-12 // old_group))
    kept = [[entry for entry in each if entry[1] <= step] for each in taken]
    batches = global_batches(kept, old_group, old_length) | global_batches([each[0] for each in after], group, length)
    assert batches == global_batches(whole, 1, per_epoch)
    for epoch in range(1, EPOCHS + 1):
        samples = [i for (e, _), each in batches.items() if e == epoch for i in each]
        assert sorted(samples) == list(range(SAMPLES))
    assert after[0][3][0] == EPOCHS * length


@pytest.mark.parametrize(
    ("first", "then"), [(2, 1), (2, 3), *(pytest.param(*each, marks=pytest.mark.nightly) for each in ((2, 4), (3, 2)))]
)
def test_global_batches_are_those_of_the_unbroken_run(tmp_path, first, then):
    check(tmp_path, first, then)


def test_accumulation_makes_up_for_missing_ranks(tmp_path):
    check(tmp_path, 2, 1, most=6, most_then=6)


def test_more_ranks_need_less_accumulation(tmp_path):
    check(tmp_path, 1, 3, most=4, most_then=4, kill=20)


def test_ranks_beyond_the_saved_ones_draw_from_their_own_generators(tmp_path):
    job = Job(str(tmp_path), every=2)
    run_ranks(begin, 1, job, 4)
    drawn = run_ranks(draws_when_resumed, 3, job)
    assert len(set(drawn)) == 3
    assert drawn[1:] == run_ranks(draws_when_resumed, 3, job)[1:]


def draws_when_resumed(world, job):
    """What the first draw of a resumed run gives, once the checkpoint has put the generators back."""
    run, drawn = Run(world, job), []

    def draw():
        drawn.append(float(torch.rand(())))
        raise Killed  # before anything is saved, so that the next run resumes from the same place

    run.engine.add_event_handler(Events.STARTED, draw)
    run.go()
    return drawn[0]


def test_a_checkpoint_says_what_it_is_of(tmp_path):
    job = Job(str(tmp_path), every=2)
    run_ranks(begin, 2, job, 4)
    found = Store(str(tmp_path), coordinator=Alone(), background=Alone()).choose()
    assert found.manifest.world_size == 2
    assert found.manifest.facts["iteration"] == 2
