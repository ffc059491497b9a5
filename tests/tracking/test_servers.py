"""Tools whose runs are on a server: each series is there once, also where ranks or the server go away."""

from __future__ import annotations

import json
from functools import partial

import pytest

from allstep.testing import run_ranks
from allstep.tracking import MLflow, Trackio, WandB, send
from tests.jobs.ports import free_port
from tests.tracking.job import EPOCHS, EVERY, LENGTH, lines, mlflow_at, read_trackio, run_of, train
from tests.tracking.servers import KEY, WandbServer, mlflow_server, require_mlflow_server, trackio_server
from tests.tracking.test_kills import killed_and_resumed

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1200)]

KILLS = [(9, 0.02), (14, 0.0), (8, 0.03)]


def told(folder):
    """The numbers of the lines of JSON, as a tool has them: by name steps and values."""
    series = {}
    for line in lines(folder):
        for name, value in line.items():
            if name not in ("step", "epoch") and isinstance(value, int | float):
                series.setdefault(name, []).append((line["step"], value))
    return series


def test_series_on_mlflows_server_after_kills_are_those_of_an_unbroken_run(tmp_path):
    require_mlflow_server()
    with mlflow_server(tmp_path) as address:
        run_ranks(train, 2, str(tmp_path / "whole"), [partial(MLflow, "whole", address)], timeout=100)
        served = [partial(MLflow, "killed", address)]
        assert killed_and_resumed(tmp_path / "killed", served, 2, KILLS) == len(KILLS)
        assert mlflow_at(address, "killed") == mlflow_at(address, "whole") == told(tmp_path / "whole")


def test_values_for_mlflows_server_wait_for_it(tmp_path):
    require_mlflow_server()
    port = free_port()
    served = partial(MLflow, "away", f"http://127.0.0.1:{port}")
    environment = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    run_ranks(train, 1, str(tmp_path), [served], None, 1.0, timeout=100, env=environment)
    with mlflow_server(tmp_path, port) as address:
        assert send(tmp_path / "track", [served()]) == 0
        assert mlflow_at(address, "away") == told(tmp_path)


def test_series_on_trackios_server_after_kills_are_whole_in_the_last_run(tmp_path):
    pytest.importorskip("trackio")
    (tmp_path / "trackio").mkdir()
    with trackio_server(tmp_path / "trackio") as address:
        served = [partial(Trackio, name="mine", server_url=address)]
        kills = [(*kill, "trackio") for kill in KILLS]
        assert killed_and_resumed(tmp_path / "job", served, 2, kills) == len(kills)
        last = run_of(tmp_path / "job", "trackio")
        assert last == f"mine continued {len(kills)}"
        (series,) = run_ranks(read_trackio, 1, str(tmp_path), last, timeout=60)
        assert series == told(tmp_path / "job") | {"note": notes()}


def notes():
    return [(epoch * LENGTH, f"epoch {epoch}") for epoch in range(1, EPOCHS + 1)]


def wandb_environment(address):
    return {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}


def online():
    import wandb

    return WandB(mode="online", settings=wandb.Settings(init_timeout=10))


def test_series_on_wandbs_server_after_kills_are_whole_in_the_last_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    with WandbServer() as server:
        for name, value in wandb_environment(server.address).items():
            monkeypatch.setenv(name, value)
        kills = [(*kill, "wandb") for kill in KILLS]
        assert killed_and_resumed(tmp_path, [online], 2, kills) == len(kills)
        position = json.loads((tmp_path / "track" / "wandb.json").read_text())
        last = position["identity"]["run"]
        assert server.series(last) == told(tmp_path) | {"note": notes()}
        assert [step for step, _ in server.series(last)["loss"]] == list(range(EVERY, EPOCHS * LENGTH + 1, EVERY))
        parents = {run: config.get("allstep.continues", {}).get("value") for run, config in server.runs.items()}
        chain = [last]
        while parents.get(chain[-1]):
            chain.append(parents[chain[-1]])
        assert len(chain) == len(KILLS) + 1  # each start had begun its own


def test_values_for_wandbs_server_wait_for_it(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    port = free_port()
    for name, value in wandb_environment(f"http://127.0.0.1:{port}").items():
        monkeypatch.setenv(name, value)
    run_ranks(train, 1, str(tmp_path), [online], None, 1.0, timeout=100)
    with WandbServer(port) as server:
        assert send(tmp_path / "track", [online()]) == 0
        (run,) = server.lines
        assert server.series(run)["loss"] == told(tmp_path)["loss"]
