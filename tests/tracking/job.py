"""A tracked training job that a kill ends at any moment, and what its tools say afterwards."""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from allstep import Checkpoint, Engine, Events, Mean, Metrics, Track
from allstep.testing import run_ranks
from tests.jobs.processes import await_condition
from tests.regression import squared_error_step, sums

EPOCHS, LENGTH, EVERY = 4, 12, 2
PAUSE_S = 0.01
IMPORTS = {"tensorboard": "tensorboard.summary.writer.event_file_writer"}


def train(world, folder, tools, kill=None, patience=20.0):
    """One start of the job's script; the main rank kills itself: (after so many iterations of it, seconds later).

    Tools are names, or functions that make a tracker. The kill waits until a tool that `kill` has as a third thing has
    begun a run.
    """
    os.environ["TRACKIO_DIR"] = f"{folder}/trackio"
    world.seed_everything(1)
    model = world.wrap(nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    loader = world.loader(sums(12 * LENGTH, 3), global_batch_size=12, shuffle=True)
    trainer = Engine(squared_error_step(model, optimizer))
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: time.sleep(PAUSE_S))
    evaluator = Engine(lambda engine, batch: F.mse_loss(world.unwrap(model)(batch[0]), batch[1]))
    Metrics({"error": Mean()}).attach(evaluator)
    trainer.add_event_handler(Events.OPTIMIZER_STEP_COMPLETED, lambda: scheduler.step())
    checkpoint = Checkpoint(f"{folder}/checkpoints", every=5).attach(trainer)
    made = [tool() if callable(tool) else tool for tool in tools]
    track = Track(f"{folder}/track", to=made, every=EVERY, loss="loss", weights=model, patience=patience)
    track.attach(trainer).watch(evaluator)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(loader))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: track.log({"note": f"epoch {trainer.state.epoch}"}))
    checkpoint.resume()
    if world.rank == 0:  # before the clock runs, since some take longer than the job
        for tool in made:
            name = getattr(tool, "package", tool)
            importlib.import_module(IMPORTS.get(name, name))
    if kill is not None and world.rank == 0:
        iterations, delay, *slow = kill
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))

        @trainer.on(Events.ITERATION_COMPLETED(once=trainer.state.iteration + iterations))
        def begin():
            if slow:
                await_condition(lambda: run_of(folder, slow[0]) not in (None, before), 60)
            timer.start()

        before = run_of(folder, slow[0]) if slow else None
    trainer.run(loader, max_epochs=EPOCHS)
    track.close()


def run_of(folder, tool):
    """Which run of a tool a Track is in; None before it has begun one."""
    place = Path(f"{folder}/track/{tool}.json")
    return json.loads(place.read_text())["identity"]["run"] if place.exists() else None


def lines(folder):
    """What the lines of JSON say, without the clock."""
    with open(f"{folder}/track/metrics.jsonl") as file:
        return [{name: value for name, value in json.loads(line).items() if name != "time"} for line in file]


def table(folder):
    """What the table says, without the clock."""
    with open(f"{folder}/track/metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "time"} for row in csv.DictReader(file)]


def tensorboard(folder):
    """What TensorBoard's own reader says: by name steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(f"{folder}/track/tensorboard", size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    series = {tag: [(each.step, each.value) for each in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    texts = {tag: [each.step for each in reader.Tensors(tag)] for tag in reader.Tags()["tensors"]}
    return series, texts


def mlflow(folder):
    """What MLflow says of its newest run in a folder: by name steps and values."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    return mlflow_at(Path(f"{folder}/track/mlflow").absolute().as_uri())


def mlflow_at(uri, experiment="allstep"):
    """The same of an experiment anywhere."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    runs = [each for each in client.search_runs([found.experiment_id]) if "allstep.continued_by" not in each.data.tags]
    assert len(runs) == 1
    names = sorted(runs[0].data.metrics)
    history = {name: client.get_metric_history(runs[0].info.run_id, name) for name in names}
    return {name: [(each.step, each.value) for each in points] for name, points in history.items()}


def trackio(folder):
    """What Trackio says of the one run that it has: by name steps and values."""
    found = run_ranks(read_trackio, 1, str(folder), timeout=60)
    return found[0]


def read_trackio(world, folder, name=None):
    """By name steps and values of a run, or of the one that there is."""
    os.environ["TRACKIO_DIR"] = f"{folder}/trackio"  # before it is imported
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = [each for each in Api().runs("allstep") if name in (None, each.name)]
    series = {}
    for row in SQLiteStorage.get_logs("allstep", run.name):
        for name in row.keys() - {"step", "timestamp"}:
            series.setdefault(name, []).append((row["step"], row[name]))
    return series


READERS = {"jsonl": lines, "csv": table, "tensorboard": tensorboard, "mlflow": mlflow, "trackio": trackio}
