"""A checkpoint finds by itself what its run needs: what a script forgets to give comes back all the same."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from allstep import Checkpoint, EarlyStopping, Engine, Events, Metrics
from allstep.checkpoint import PerRank, Store
from allstep.errors import CheckpointError
from allstep.metrics import Mean
from allstep.testing import run_ranks
from tests.regression import Killed, same, squared_error_step, sums


def bare(folder, objects=None, **options):
    trainer = Engine(lambda engine, batch: None)
    return trainer, Checkpoint(folder, objects, every=None, **options).attach(trainer)


class Script:
    """A training script that gives its checkpoint nothing, ended once by early stopping and once by a kill."""

    def __init__(self, world, folder, kill_at=None):
        world.seed_everything(3)
        model = world.wrap(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1)))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.8)
        data = world.loader(sums(24, 4), global_batch_size=6, shuffle=True)
        trainer = Engine(squared_error_step(model, optimizer))
        trainer.add_event_handler(Events.OPTIMIZER_STEP_COMPLETED, lambda: scheduler.step())
        Metrics({"loss": Mean()}).attach(trainer)
        # Better in epochs 1 and 2 only, so that patience ends the run in epoch 4.
        score = lambda engine: min(engine.state.epoch, 2) + 0.0 * engine.state.metrics["loss"]  # noqa: E731
        EarlyStopping(2, score, trainer).attach(trainer, Events.EPOCH_COMPLETED)
        self.losses = []
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.losses.append(trainer.state.metrics["loss"]))
        self.checkpoint = Checkpoint(folder, every=1).attach(trainer)

        @trainer.on(Events.ITERATION_COMPLETED)
        def maybe_die(engine):
            if engine.state.iteration == kill_at:
                raise Killed

        self.checkpoint.resume()
        self.began_at = trainer.state.iteration
        try:
            trainer.run(data, max_epochs=10)
        except Killed as killed:
            killed.__traceback__ = None
            self.checkpoint.close()
        self.trainer, self.scheduler = trainer, scheduler
        self.weights = [each.detach().clone() for each in model.parameters()]


def ends_of_scripts(world, folder, kills):
    whole = Script(world, f"{folder}/whole")
    found = []
    for kill in kills:
        Script(world, f"{folder}/{kill}", kill)
        resumed = Script(world, f"{folder}/{kill}")
        found.append(
            (
                resumed.began_at,
                resumed.trainer.state.epoch,
                same(whole.weights, resumed.weights),
                whole.losses[-len(resumed.losses) :] == resumed.losses,
                resumed.scheduler.state_dict() == whole.scheduler.state_dict(),
            )
        )
    return whole.trainer.state.epoch, sorted(whole.checkpoint.objects), found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_a_script_that_gives_nothing_resumes_exactly(ranks, tmp_path):
    kills = [7, 13]
    for epoch, names, found in run_ranks(ends_of_scripts, ranks, str(tmp_path), kills, timeout=100):
        assert epoch == 4
        assert names == ["EarlyStopping", "Metrics of loss", "model", "optimizer", "scheduler", "trainer"]
        assert found == [(kill - 1, 4, True, True, True) for kill in kills]


def test_an_object_both_given_and_found_is_saved_once_under_the_given_name(tmp_path):
    model = nn.Linear(1, 1)
    trainer = Engine(lambda engine, batch: float(model is not None))
    metrics = Metrics({"loss": Mean()}).attach(trainer)
    given = {"net": model, "loop": trainer, "numbers": PerRank(metrics)}
    checkpoint = Checkpoint(tmp_path, given, every=None).attach(trainer)
    trainer.run([1])
    assert checkpoint.objects == given


def test_parts_of_what_is_saved_and_modules_without_state_are_not_saved_again(tmp_path):
    model, loss = nn.Sequential(nn.Linear(1, 1), nn.ReLU()), nn.MSELoss()
    body = model[0]
    trainer = Engine(lambda engine, batch: (body, model, loss))
    checkpoint = Checkpoint(tmp_path, every=None).attach(trainer)
    checkpoint.resume()
    assert list(checkpoint.objects) == ["trainer", "model"]


def test_what_is_left_out_is_not_saved(tmp_path):
    teacher = nn.Linear(1, 1)
    trainer = Engine(lambda engine, batch: teacher)
    checkpoint = Checkpoint(tmp_path, every=None, leave_out=[teacher]).attach(trainer)
    checkpoint.resume()
    assert list(checkpoint.objects) == ["trainer"]


def test_a_found_object_without_a_state_is_named_and_training_goes_on(tmp_path, caplog):
    class Odd:
        def state_dict(self):
            return {"handle": object()}

        def load_state_dict(self, state):
            raise AssertionError

    odd = Odd()
    trainer = Engine(lambda engine, batch: odd)
    Checkpoint(tmp_path, every=1).attach(trainer)
    trainer.run([1, 2])
    assert caplog.text.count("odd is used by the run and is not saved") == 1
    assert Store(str(tmp_path)).choose().manifest.step == 2


def test_what_comes_after_resume_is_refused_on_the_first_start(tmp_path):
    trainer, checkpoint = bare(tmp_path)
    assert checkpoint.resume() is None
    EarlyStopping(1, lambda engine: 0.0, trainer).attach(trainer, Events.EPOCH_COMPLETED)
    with pytest.raises(CheckpointError, match=r"EarlyStopping came after resume\(\)"):
        trainer.run([1])


def test_what_comes_between_two_runs_of_a_script_is_saved_from_then_on(tmp_path):
    trainer, checkpoint = bare(tmp_path)
    checkpoint.resume()
    trainer.run([1])
    EarlyStopping(1, lambda engine: 0.0, trainer).attach(trainer, Events.EPOCH_COMPLETED)
    trainer.run([1], max_epochs=2)
    assert "EarlyStopping" in checkpoint.objects


def test_resume_inside_the_run_is_refused_on_the_first_start(tmp_path):
    trainer, checkpoint = bare(tmp_path)
    trainer.add_event_handler(Events.STARTED, lambda: checkpoint.resume())
    with pytest.raises(CheckpointError, match=r"call resume\(\) before run\(\)"):
        trainer.run([1])


def saved_under(folder, name):
    model = nn.Linear(1, 1)
    trainer = Engine(lambda engine, batch: model)
    Checkpoint(folder, {name: model}, every=None).attach(trainer)
    trainer.run([1])
    return model


def test_a_checkpoint_with_another_name_says_what_to_do(tmp_path):
    saved_under(tmp_path, "net")
    model = nn.Linear(1, 1)
    trainer = Engine(lambda engine, batch: model)
    checkpoint = Checkpoint(tmp_path, every=None).attach(trainer)
    with pytest.raises(
        CheckpointError, match=r"lacks model \(model: found by itself\); it has net, trainer.*partial=True"
    ):
        checkpoint.resume()
    before = model.weight.clone()
    assert checkpoint.resume(partial=True) is not None
    assert trainer.state.iteration == 1
    assert torch.equal(model.weight, before)


def test_a_checkpoint_from_before_objects_were_found_loads_with_one_warning(tmp_path, caplog):
    given = nn.Linear(1, 1)
    Store(str(tmp_path)).save(1, {"net": given.state_dict()}).wait()
    net, other = nn.Linear(1, 1), nn.Linear(1, 1)
    trainer = Engine(lambda engine, batch: other)
    Checkpoint(tmp_path, {"net": net}, every=None).attach(trainer).resume()
    assert torch.equal(net.weight, given.weight)
    assert caplog.text.count("the checkpoint lacks trainer, other, which begins as it is now") == 1


def test_a_handler_that_was_added_to_a_script_begins_anew_with_one_warning(tmp_path, caplog):
    bare(tmp_path)[0].run([1])
    trainer, checkpoint = bare(tmp_path)
    EarlyStopping(1, lambda engine: 0.0, trainer).attach(trainer, Events.EPOCH_COMPLETED)
    assert checkpoint.resume() is not None
    assert caplog.text.count("the checkpoint lacks EarlyStopping") == 1


class Hidden:
    """An optimizer where nobody looks."""

    __slots__ = ("inner",)


@pytest.mark.parametrize("is_given", [False, True])
def test_an_optimizer_that_is_out_of_sight_is_named_at_its_first_step(is_given, tmp_path, caplog):
    model, hidden = nn.Linear(1, 1), Hidden()
    hidden.inner = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(engine, batch):
        model(torch.ones(1)).sum().backward()
        hidden.inner.step()

    trainer = Engine(step)
    objects = {"optimizer": hidden.inner} if is_given else None
    Checkpoint(tmp_path, objects, every=None).attach(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.run([1] * 3)
    assert caplog.text.count("an optimizer (SGD) that trains what is saved is not saved itself") == int(not is_given)


def test_wrapped_modules_that_nobody_shows_are_known_from_the_world(tmp_path):
    run_ranks(save_a_module_out_of_sight, 1, str(tmp_path), timeout=60)


def save_a_module_out_of_sight(world, folder):
    hidden = Hidden()
    hidden.inner = world.wrap(nn.Linear(1, 1))
    trainer = Engine(lambda engine, batch: hidden)
    checkpoint = Checkpoint(folder, every=None).attach(trainer)
    checkpoint.resume()
    assert list(checkpoint.objects) == ["trainer", "model"]
