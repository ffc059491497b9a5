"""Trackers that keep runs elsewhere: MLflow, Weights & Biases and Trackio. None of them forgets a single step.

Contract: see `tracker`. After a kill behind which a step may be that the resumed run takes again, `restart` begins
another run of the tool. It names the one before, and is sent everything. Where nothing is behind the checkpoint, MLflow
is asked what it has, and the same run goes on. Trackio's own local runs can be deleted, so that there the new run takes
the old one's name. Each package is imported by the thread that sends, when the first value comes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from allstep.tracking.values import Histogram, Image, Value

_PARENT = "allstep.continues"


class _Identity:
    """Which run of the tool this is: its id, and the id of the run that it continues."""

    def __init__(self) -> None:
        self.run: str | None = None
        self.parent: str | None = None
        self._time = 0.0
        self._config: Mapping[str, Any] = {}

    def log_time(self, seconds: float) -> None:
        """When the next record was made."""
        self._time = seconds

    def configure(self, config: Mapping[str, Any]) -> None:
        """Keep the configuration, for the run when it begins."""
        self._config = config

    def state_dict(self) -> dict[str, Any]:
        """The ids."""
        return {"run": self.run, "parent": self.parent}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Go on in that run."""
        self.run, self.parent = state_dict["run"], state_dict["parent"]


class MLflow(_Identity):
    """A run of MLflow, in a folder, or on a server.

    Args:
        experiment: its name, made where there is none.
        uri: a folder or the address of a server; by default what MLFLOW_TRACKING_URI says, else "mlflow" in the folder
            of the Track.
        name: of the run.
    """

    package = "mlflow"

    def __init__(self, experiment: str = "allstep", uri: str | None = None, name: str | None = None) -> None:
        super().__init__()
        self.experiment = experiment
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.name = name
        self._client: Any = None
        self._metrics: list[Any] = []

    def open(self, folder: Path) -> None:
        """Remember where the runs are; nothing is asked of a server yet."""
        self.uri = self.uri or str(folder / "mlflow")
        if "://" not in self.uri:
            self.uri = Path(self.uri).absolute().as_uri()
        if self.uri.startswith("file:"):
            # Newer releases want a folder to be asked for; giving one here is asking.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")

    def configure(self, config: Mapping[str, Any]) -> None:
        """Keep the configuration as the run's parameters; what is there already stays."""
        client, run = self._begun()
        known = client.get_run(run).data.params
        for name, value in config.items():
            if name not in known:
                client.log_param(run, name, value)

    def begin(self) -> None:
        """Make the run, so that it is known by its id before it has values."""
        self._begun()

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Give numbers to the run, and files of the rest to its artifacts."""
        from mlflow.entities import Metric

        client, run = self._begun()
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if numbers:
            at = round(self._time * 1000)
            client.log_batch(run, [Metric(name, float(value), at, step) for name, value in numbers.items()])
        for name, value in values.items():
            if isinstance(value, Image):
                client.log_artifact(run, value.path, "images")
            elif isinstance(value, str):
                client.log_text(run, value, f"texts/{name}-{step}.txt")
            elif isinstance(value, Histogram):
                content = {"counts": value.counts, "edges": value.edges}
                client.log_dict(run, content, f"histograms/{name}-{step}.json")

    def log_again(self, values: Mapping[str, Value], step: int) -> None:
        """Log what the run does not have at this step."""
        client, run = self._begun()
        at = round(self._time * 1000)

        def is_there(name: str, value: Value) -> bool:
            if not isinstance(value, int | float):
                return False  # a file, which is only written once more
            return any(each.step == step and each.timestamp == at for each in client.get_metric_history(run, name))

        self.log({name: value for name, value in values.items() if not is_there(name, value)}, step)

    def restart(self) -> None:
        """Begin another run, which names this one."""
        before, self.run = self.run, None
        self.parent = before or self.parent
        client, run = self._begun()
        if before is not None:
            with contextlib.suppress(Exception):  # it may have been deleted
                client.set_tag(before, "allstep.continued_by", run)
                client.set_terminated(before, "KILLED")

    def close(self) -> None:
        """Say that the run is over; a later start opens it again by logging."""
        if self.run is not None and self._client is not None:
            self._client.set_terminated(self.run)

    def _begun(self) -> tuple[Any, str]:
        """The client and the run, made when they are first needed."""
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
        if self.run is None:
            found = self._client.get_experiment_by_name(self.experiment)
            experiment = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
            tags = {} if self.parent is None else {_PARENT: self.parent}
            self.run = self._client.create_run(experiment, tags=tags, run_name=self.name).info.run_id
        return self._client, str(self.run)


class WandB(_Identity):
    """A run of Weights & Biases.

    Args:
        project: its name.
        mode: "online" or "offline", whose runs `wandb sync` sends; by default what WANDB_MODE says.
        options: what else `wandb.init` takes, such as `entity`, `name` or `group`.
    """

    package = "wandb"

    def __init__(
        self, project: str = "allstep", mode: Literal["online", "offline"] | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.project = project
        self.mode = mode
        self.options = options
        self._run: Any = None
        self._folder: Path | None = None

    def open(self, folder: Path) -> None:
        """Remember where offline runs are kept."""
        self._folder = folder

    def begin(self) -> None:
        """Make the run, so that it is known by its id before it has values."""
        self._begun()

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Give them to the run."""
        run = self._begun()
        run.log({name: self._own(value) for name, value in values.items()}, step=step)

    def flush(self) -> bool:
        """Not known: its own process sends."""
        return False

    def restart(self) -> None:
        """Begin another run, which names this one."""
        self._finish()
        self.parent, self.run = self.run or self.parent, None

    def close(self) -> None:
        """Wait until all is sent, or kept for `wandb sync`."""
        self._finish()

    def _finish(self) -> None:
        if self._run is not None:
            self._run.finish()
        self._run = None

    def _begun(self) -> Any:
        if self._run is None:
            import wandb

            config = {**self._config, **({} if self.parent is None else {_PARENT: self.parent})}
            self._run = wandb.init(
                project=self.project,
                mode=self.mode,
                dir=str(self._folder),
                id=self.run,
                resume=None if self.run is None else "allow",
                config=config,
                reinit="create_new",
                **self.options,
            )
            self.run = self._run.id
        return self._run

    def _own(self, value: Value) -> Any:
        import wandb

        if isinstance(value, Histogram):
            return wandb.Histogram(np_histogram=(np.asarray(value.counts), np.asarray(value.edges)))
        return wandb.Image(value.path) if isinstance(value, Image) else value


class Trackio(_Identity):
    """A run of Trackio, local or on a server.

    Args:
        project: its name.
        name: of the run; by default the Track's folder and some letters.
        options: what else `trackio.init` takes, such as `server_url` or `space_id`.
    """

    package = "trackio"

    def __init__(self, project: str = "allstep", name: str | None = None, **options: Any) -> None:
        super().__init__()
        self.project = project
        self.name = name
        self.options = options
        self._id: str | None = None  # of a local run, since several may have one name
        self._run: Any = None

    @property
    def is_local(self) -> bool:
        """Whether runs are in a database of this machine."""
        places = {"server_url": "TRACKIO_SERVER_URL", "space_id": "TRACKIO_SPACE_ID"}
        return not any(self.options.get(name) or os.environ.get(variable) for name, variable in places.items())

    def open(self, folder: Path) -> None:
        """Choose a name that no other run has."""
        self.name = self.name or f"{folder.absolute().name}-{secrets.token_hex(3)}"

    def begin(self) -> None:
        """Make the run, so that it is known by its id before it has values."""
        self._begun()

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Give them to the run; of an image, where its file is."""
        self._begun().log({name: _trackio_value(value) for name, value in values.items()}, step=step)

    def flush(self) -> bool:
        """Not known: a thread of its own writes."""
        return False

    def restart(self) -> None:
        """Delete a local run and begin it anew; elsewhere begin another one, which names it."""
        import trackio

        self.close()
        if self.run is None:
            return
        self.name = self.run
        if self.is_local:
            with contextlib.suppress(ValueError):  # there is no such project
                for run in [each for each in trackio.Api().runs(self.project) if each.id == self._id]:
                    run.delete()
        else:
            stem, _, number = self.run.rpartition(" continued ")
            self.parent = self.run
            self.name = f"{stem or self.run} continued {int(number) + 1 if stem else 1}"
        self.run = None

    def close(self) -> None:
        """Wait until all is written."""
        if self._run is not None:
            self._run.finish()
        self._run = None

    def state_dict(self) -> dict[str, Any]:
        """The run's name and id."""
        return {**super().state_dict(), "id": self._id}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Go on in that run."""
        super().load_state_dict(state_dict)
        self._id = state_dict["id"]

    def _begun(self) -> Any:
        if self._run is None:
            import trackio

            config = {**self._config, **({} if self.parent is None else {_PARENT: self.parent})}
            name = self.run or self.name
            options = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False, **self.options}
            self._run = trackio.init(
                project=self.project,
                name=name,
                config=json.loads(json.dumps(config, default=str)),
                resume="never" if self.run is None else "allow",
                **options,
            )
            self.run, self._id = self._run.name, self._run.id
        return self._run


def _trackio_value(value: Value) -> Any:
    if isinstance(value, Histogram):
        return json.dumps({"counts": value.counts, "edges": value.edges})
    if isinstance(value, Image):
        return value.path
    return value if isinstance(value, str) or math.isfinite(value) else str(value)
