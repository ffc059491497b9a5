"""What a Track records of a run, and when."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
from torch import nn

from allstep import Checkpoint, Engine, Events, Mean, Metrics, Track
from allstep.errors import ArgumentError, ArgumentTypeError, MissingExtraError
from allstep.testing import run_ranks


def told(folder, *names):
    """The lines, or those values of them that have a name."""
    with open(f"{folder}/metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    return [(line["step"], line[name]) for line in lines for name in names if name in line] if names else lines


def trained(folder, iterations=6, **options):
    """A run of a line whose outputs are its iterations' numbers."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}], lr=0.1)

    def step(engine, batch):
        optimizer.zero_grad()
        model(torch.ones(1)).sum().backward()
        optimizer.step()
        return torch.tensor(float(engine.state.iteration))

    trainer = Engine(step)
    if options.pop("weights", False):
        options["weights"] = model
    track = Track(folder, **options).attach(trainer)
    trainer.run([1] * iterations, max_epochs=1)
    track.close()
    return model


def test_the_loss_is_the_mean_since_the_last_record(tmp_path):
    trained(tmp_path, every=3, loss="loss")
    assert told(tmp_path, "loss") == [(3, 2.0), (6, 5.0)]


def test_rates_of_the_optimizer_that_the_step_uses_are_found(tmp_path):
    trained(tmp_path, every=6)
    assert told(tmp_path, "lr/0", "lr/1") == [(6, 0.1), (6, 0.5)]


def test_norms_and_histograms_of_weights_and_gradients_are_recorded(tmp_path):
    model = trained(tmp_path, every=6, weights=True, histograms=True)
    (line,) = told(tmp_path)
    assert line["weights/norm"] == pytest.approx(float(nn.utils.get_total_norm(list(model.parameters()))))
    assert line["gradients/norm"] == pytest.approx(2**0.5)
    assert sum(line["gradients/weight"]["histogram"]["counts"]) == 1


def test_what_a_script_tells_stands_at_its_iteration(tmp_path):
    trainer = Engine(lambda engine, batch: None)
    track = Track(tmp_path, values=lambda engine: {"double": 2 * engine.state.iteration}, every=2).attach(trainer)

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    def tell():
        track.log({"note": "hello", "n": 3})
        track.image("picture", torch.zeros(2, 2))
        track.histogram("spread", [1.0, 2.0])

    trainer.run([1, 2, 3])
    track.close()
    assert told(tmp_path, "note", "n", "double") == [(2, {"text": "hello"}), (2, 3), (2, 4)]
    ((_, picture),) = told(tmp_path, "picture")
    assert (tmp_path / picture["image"]).read_bytes().startswith(b"\x89PNG")
    assert told(tmp_path, "spread")[0][1]["histogram"]["edges"][0] == 1.0


def test_the_configuration_is_told_once(tmp_path):
    for epochs in (1, 2):
        trainer = Engine(lambda engine, batch: None)
        checkpoint = Checkpoint(tmp_path / "saved").attach(trainer)
        Track(tmp_path, config={"lr": 0.1}).attach(trainer)
        checkpoint.resume()
        trainer.run([1], max_epochs=epochs)
    assert [line["config"] for line in told(tmp_path) if "config" in line] == [{"lr": 0.1}]


def numbers_of_ranks(world, folder):
    trainer, evaluator = Engine(lambda engine, batch: 10.0 * world.rank), Engine(lambda engine, batch: world.rank)
    Metrics({"rank": Mean()}).attach(evaluator)
    track = Track(folder, every=2, loss="loss").attach(trainer).watch(evaluator, "test")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([torch.zeros(1)]))
    trainer.run([torch.zeros(1)] * 2)
    track.close()
    return len(list(world.gather_objects(None)))


@pytest.mark.slow
def test_numbers_are_of_all_ranks_and_the_main_one_writes_them(tmp_path):
    run_ranks(numbers_of_ranks, 2, str(tmp_path), timeout=60)
    assert told(tmp_path, "loss", "test/rank") == [(2, 5.0), (2, 0.5)]


@pytest.mark.parametrize("attach_first", ["checkpoint", "track"])
def test_a_record_at_the_iteration_of_a_save_is_in_it(attach_first, tmp_path):
    trainer = Engine(lambda engine, batch: 1.0)
    checkpoint = Checkpoint(tmp_path / "saved", every=2, keep_last=None)
    track = Track(tmp_path, every=2, loss="loss")
    for each in (checkpoint, track) if attach_first == "checkpoint" else (track, checkpoint):
        each.attach(trainer)
    trainer.run([1] * 4)
    track.close()
    again, other = Engine(lambda engine, batch: 1.0), Track(tmp_path, every=2, loss="loss")
    resumed = Checkpoint(tmp_path / "saved", every=None).attach(again)
    other.attach(again)
    first = sorted((tmp_path / "saved").glob("save-*"))[0]
    resumed.resume(first)
    again.run([1] * 4)
    other.close()
    assert [step for step, _ in told(tmp_path, "loss")] == [2, 4]
    assert len(told(tmp_path)) == len({json.dumps([each["step"], sorted(each)]) for each in told(tmp_path)})


def test_a_run_that_begins_anew_tells_all_anew_and_loses_nothing(tmp_path):
    trained(tmp_path, every=3, loss="loss")
    trained(tmp_path, every=3, loss="loss")
    assert told(tmp_path, "loss") == [(3, 2.0), (6, 5.0)]
    assert len((tmp_path / "withdrawn.jsonl").read_text().splitlines()) == 2


def test_what_was_loaded_is_kept_until_a_run_begins(tmp_path):
    track, place = Track(tmp_path), {"records": 3, "trackers": {"csv": {}}}
    track.load_state_dict(place)
    track.load_state_dict(track.state_dict())  # as a finder does that leaves no trace
    assert track.state_dict() == place


def test_an_iteration_that_is_not_due_calls_nothing_of_a_track(tmp_path):
    calls = []
    trainer = Engine(lambda engine, batch: None)
    track = Track(tmp_path, every=4, values=lambda engine: calls.append(engine.state.iteration) or {})
    track.attach(trainer)
    trainer.run([1] * 9)
    assert calls == [4, 8]


def test_a_tool_that_hangs_neither_stops_nor_slows_a_run(tmp_path, caplog):
    gate = threading.Event()

    class Hanging:
        def log(self, values, step):
            gate.wait()

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    trainer = Engine(lambda engine, batch: 1.0)
    track = Track(tmp_path, to=[Hanging(), "csv"], every=1, loss="loss", patience=0.5).attach(trainer)
    began = time.monotonic()
    trainer.run([1] * 50)
    track.close()
    assert time.monotonic() - began < 20
    gate.set()
    assert caplog.text.count("were not taken by hanging in time") == 1
    assert len(told(tmp_path, "loss")) == 50
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 51


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"every": 0}, ArgumentError, "every is 0"),
        ({"to": "csv"}, ArgumentTypeError, "give a list"),
        ({"to": ["tensorbord"]}, ArgumentError, "to has 'tensorbord'"),
        ({"to": [object()]}, ArgumentTypeError, "log\\(values, step\\)"),
    ],
)
def test_wrong_arguments_are_refused_with_what_to_do(wrong, error, says, tmp_path):
    with pytest.raises(error, match=says):
        Track(tmp_path, **wrong)


def test_a_tool_that_is_not_installed_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("allstep.tracking.track.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'allstep\[wandb\]'"):
        Track(tmp_path, to=["wandb"])
