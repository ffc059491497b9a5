"""What each tool shows of all kinds of values, read back with its own reader; other libraries' loggers as they are."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch

from allstep import Engine, Events, Track
from allstep.testing import run_ranks
from allstep.tracking import CSV, MLflow, TensorBoard, Trackio, WandB, send
from allstep.tracking.files import frames  # the framing of event files


def told(folder, tools, iterations=4):
    """A run that tells a number, a text, a histogram and an image."""
    trainer = Engine(lambda engine, batch: None)
    track = Track(folder, to=tools, every=2, values=lambda e: {"x": e.state.iteration / 2}, config={"lr": 0.1})
    track.attach(trainer)

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def tell():
        track.log({"note": "two\nlines"})
        track.histogram("spread", torch.arange(8.0), bins=4)
        track.image("picture", torch.zeros(4, 6, 3))

    trainer.run([1] * iterations)
    track.close()


def test_a_table_has_a_row_a_record_and_grows_columns(tmp_path):
    told(tmp_path, ["csv"])
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["x"], row["note"]) for row in rows] == [
        ("2", "1.0", ""),
        ("3", "", "two\\nlines"),
        ("4", "2.0", ""),
    ]


def test_a_row_that_a_kill_cut_off_is_not_in_the_table(tmp_path):
    told(tmp_path, ["csv"])
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6,1.0,3")
    table = CSV(tmp_path / "metrics.csv")
    table.open(tmp_path)
    table.withdraw(4)
    assert [line.split(",")[0] for line in (tmp_path / "metrics.csv").read_text().splitlines()] == ["step", "2", "3"]


def test_tensorboard_reads_all_kinds_of_values(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told(tmp_path, ["tensorboard"])
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert [(each.step, each.value) for each in reader.Scalars("x")] == [(2, 1.0), (4, 2.0)]
    assert [each.step for each in reader.Tensors("note/text_summary")] == [3]
    assert reader.Histograms("spread")[0].histogram_value.num == 8
    assert (reader.Images("picture")[0].height, reader.Images("picture")[0].width) == (4, 6)
    assert b"| lr | 0.1 |" in reader.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_event_files_are_cut_also_where_a_kill_left_half_an_event(tmp_path):
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        board.log({"x": step}, step)
    board.close()
    (path,) = tmp_path.glob("*tfevents*")
    whole = len(list(frames(path)))
    os.truncate(path, path.stat().st_size - 3)
    board.withdraw(3)
    assert len(list(frames(path))) == whole - 1
    board.withdraw(0)
    assert list(tmp_path.glob("*tfevents*")) == []


@pytest.mark.nightly
def test_mlflow_has_numbers_parameters_and_files(tmp_path):
    pytest.importorskip("mlflow")
    told(tmp_path, [MLflow("mine")])
    from mlflow import MlflowClient

    client = MlflowClient((tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.data.params == {"lr": "0.1"}
    assert [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "x")] == [(2, 1.0), (4, 2.0)]
    files = {each.path for kind in ("images", "texts") for each in client.list_artifacts(run.info.run_id, kind)}
    assert files == {"images/picture-3.png", "texts/note-3.txt"}


@pytest.mark.nightly
def test_mlflow_is_asked_what_it_has_and_continues_in_a_named_run(tmp_path):
    pytest.importorskip("mlflow")
    tool = MLflow()
    tool.open(tmp_path)
    tool.begin({})
    tool.log({"x": 1.0, "y": 2.0}, 1)
    tool.log_again({"x": 1.0, "y": 2.0, "z": 3.0}, 1)
    from mlflow import MlflowClient

    client, run = MlflowClient((tmp_path / "mlflow").as_uri()), tool.run
    assert [len(client.get_metric_history(run, name)) for name in "xyz"] == [1, 1, 1]
    tool.restart()
    before = tool.state_dict()  # as a kill leaves it behind that comes before the id is written down
    tool.begin({})
    again = MLflow()
    again.open(tmp_path)
    again.load_state_dict(before)
    again.begin({})
    assert again.run == tool.run
    assert client.get_run(tool.run).data.tags["allstep.continues"] == run
    assert client.get_run(run).data.tags["allstep.continued_by"] == tool.run


@pytest.mark.nightly
def test_a_folder_of_mlflow_that_a_kill_left_half_written_is_mended(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setattr("allstep.tracking.services._MADE_WITHIN_S", -1.0)
    tool = MLflow()
    tool.open(tmp_path)
    tool.begin({})
    tool.log({"x": 1.0}, 1)
    (own,) = (tmp_path / "mlflow").glob(f"*/{tool.run}/meta.yaml")
    own.write_text("")
    (own.parent / "metrics" / "y").touch()
    half_made = [own.parent.parent / (digit * 32) for digit in "1234"]
    for folder in half_made:  # a kill may come behind any of these
        (folder / "tags").mkdir(parents=True)
    (half_made[1] / "meta.yaml").touch()
    for folder in half_made[2:]:
        (folder / "meta.yaml").write_text(own.read_text() or "lifecycle_stage: active")
    (half_made[3] / "tags" / "allstep.token").write_text("0123")
    again = MLflow()
    again.open(tmp_path)
    again.load_state_dict(tool.state_dict())
    again.begin({})
    again.log({"x": 2.0}, 2)
    assert [each.value for each in again._client.get_metric_history(tool.run, "x")] == [1.0, 2.0]
    assert not any(folder.exists() for folder in half_made)
    assert own.parent.exists()


@pytest.mark.nightly
def test_weights_and_biases_keeps_an_offline_run(tmp_path):
    pytest.importorskip("wandb")
    run_ranks(keep_offline, 1, str(tmp_path), timeout=110)
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert all(list(folder.glob("*.wandb")) for folder in (first, second))


def keep_offline(world, folder):
    told(folder, [WandB(mode="offline")])
    position = json.loads(Path(folder, "wandb.json").read_text())
    assert position["begun"] == position["done"] > 0
    tool = WandB(mode="offline")
    tool.open(Path(folder))
    tool.load_state_dict(position["identity"])
    tool.restart()
    tool.begin({})
    assert tool.run != tool.parent == position["identity"]["run"]
    tool.close()


@pytest.mark.nightly
def test_trackio_keeps_one_run_under_its_name(tmp_path):
    pytest.importorskip("trackio")
    run_ranks(keep_in_trackio, 1, str(tmp_path), timeout=110)


def keep_in_trackio(world, folder):
    os.environ["TRACKIO_DIR"] = f"{folder}/trackio"
    told(folder, [Trackio(name="mine")])
    from trackio import Api

    (run,) = Api().runs("allstep")
    assert (run.name, run.config["lr"]) == ("mine", 0.1)
    tool = Trackio()
    tool.load_state_dict(json.loads(Path(folder, "trackio.json").read_text())["identity"])
    tool.restart()
    tool.begin({"lr": 0.1})
    tool.log({"x": 1.0}, 1)
    tool.close()
    (again,) = Api().runs("allstep")
    assert (again.name, again.id != run.id) == ("mine", True)


def test_loggers_of_accelerate_are_taken_as_they_are(tmp_path):
    tracking = pytest.importorskip("accelerate.tracking")
    kept = []

    class Mine(tracking.GeneralTracker):
        name, requires_logging_directory = "mine", False
        tracker = None

        def store_init_configuration(self, values):
            kept.append(values)

        def log(self, values, step=None, **_):
            kept.append((step, values))

    told(tmp_path, [Mine()])
    assert kept == [{"lr": 0.1}, (2, {"x": 1.0}), (3, {"note": "two\nlines"}), (3, {}), (3, {}), (4, {"x": 2.0})]


def test_loggers_of_lightning_are_taken_as_they_are(tmp_path):
    loggers = pytest.importorskip("lightning.fabric.loggers")
    logger = loggers.CSVLogger(str(tmp_path / "lightning"), flush_logs_every_n_steps=1)
    told(tmp_path / "track", [logger])
    with open(f"{logger.log_dir}/metrics.csv") as file:
        assert [(row["step"], row["x"]) for row in csv.DictReader(file)] == [("2", "1.0"), ("4", "2.0")]


def test_what_a_tool_could_not_take_is_sent_later(tmp_path):
    told(tmp_path, [])
    assert send(tmp_path, ["csv"]) == 0
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 4
