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
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from allstep.tracking.values import Histogram, Image, Value

_PARENT = "allstep.continues"
_TOKEN = "allstep.token"
_META = "meta.yaml"  # in which MLflow keeps what a run, or an experiment, is
_RUN_ID = re.compile(r"[0-9a-f]{32}")  # MLflow's
_MADE_WITHIN_S = 2.0


class _Identity:
    """Which run of the tool this is: its id, and the id of the run that it continues.

    The token is known before the run is made and is kept in it, so that a run is found again where a kill came between
    making it and writing down its id.
    """

    def __init__(self) -> None:
        self.run: str | None = None
        self.parent: str | None = None
        self.token = secrets.token_hex(4)
        self._time = 0.0

    def log_time(self, seconds: float) -> None:
        """When the next record was made."""
        self._time = seconds

    def restart(self) -> None:
        """Have another run begin, which names this one."""
        self.run, self.parent, self.token = None, self.run or self.parent, secrets.token_hex(4)

    def state_dict(self) -> dict[str, Any]:
        """The ids."""
        return {"run": self.run, "parent": self.parent, "token": self.token}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Go on in that run."""
        self.run, self.parent, self.token = state_dict["run"], state_dict["parent"], state_dict["token"]

    def described(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration as JSON takes it, and the parent's id."""
        known: dict[str, Any] = json.loads(json.dumps(dict(config), default=str))
        return known if self.parent is None else {**known, _PARENT: self.parent}


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
        self._is_open = False
        self._meta: tuple[str, str] | None = None  # the run's own file, and what was in it

    def open(self, folder: Path) -> None:
        """Remember where the runs are; nothing is asked of a server yet."""
        self.uri = self.uri or str(folder / "mlflow")
        if "://" not in self.uri:
            self.uri = Path(self.uri).absolute().as_uri()
        if self.uri.startswith("file:"):
            # Newer releases want a folder to be asked for; giving one here is asking.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")

    def state_dict(self) -> dict[str, Any]:
        """The ids, and what the run's own file says where runs are in a folder."""
        return {**super().state_dict(), "meta": self._meta}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Go on in that run."""
        super().load_state_dict(state_dict)
        self._meta = state_dict["meta"]

    def begin(self, config: Mapping[str, Any]) -> None:
        """Find or make the run, with the configuration as its parameters."""
        if not self._is_open:
            self._mend_folder()
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
        client = self._client
        if self.run is None:
            found = client.get_experiment_by_name(self.experiment)
            experiment = client.create_experiment(self.experiment) if found is None else found.experiment_id
            runs = client.search_runs([experiment], f"tags.`{_TOKEN}` = '{self.token}'")
            tags = {_TOKEN: self.token} if self.parent is None else {_TOKEN: self.token, _PARENT: self.parent}
            run = runs[0] if runs else client.create_run(experiment, tags=tags, run_name=self.name)
            self._end_parent(run.info.run_id)
            for name in config.keys() - run.data.params.keys():
                client.log_param(run.info.run_id, name, config[name])
            self.run = run.info.run_id
            file = None if self._root is None else self._root / experiment / str(self.run) / _META
            self._meta = None if file is None else (str(file), file.read_text())
        elif not self._is_open:
            client.update_run(self.run, "RUNNING")
        self._is_open = True

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Give numbers to the run, and files of the rest to its artifacts."""
        from mlflow.entities import Metric

        client, run = self._client, str(self.run)
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
        client, run = self._client, str(self.run)
        at = round(self._time * 1000)

        def is_there(name: str, value: Value) -> bool:
            if not isinstance(value, int | float):
                return False  # a file, which is only written once more
            return any(each.step == step and each.timestamp == at for each in client.get_metric_history(run, name))

        self.log({name: value for name, value in values.items() if not is_there(name, value)}, step)

    def close(self) -> None:
        """Say that the run is over; a later start opens it again."""
        if self._is_open:
            self._client.set_terminated(self.run)
        self._is_open = False

    def _end_parent(self, run: str) -> None:
        if self.parent is not None:
            with contextlib.suppress(Exception):  # it may have been deleted
                self._client.set_tag(self.parent, "allstep.continued_by", run)
                if self._root is None:
                    self._client.set_terminated(self.parent, "KILLED")

    @property
    def _root(self) -> Path | None:
        """The folder where runs are; None on a server."""
        return Path(self.uri[len("file://") :]) if self.uri is not None and self.uri.startswith("file://") else None

    def _mend_folder(self) -> None:
        """Put right what a kill left: MLflow writes a run's own file in place, and reads no run beside an empty one."""
        if self._root is None or not self._root.exists():
            return
        if self._meta is not None and not Path(self._meta[0]).read_text():
            Path(self._meta[0]).write_text(self._meta[1])
        # A series without a number yet makes its run unreadable, and so a list of all runs.
        for run in filter(None, (self.run, self.parent)):
            for file in self._root.glob(f"*/{run}/metrics/**/*"):
                if file.is_file() and not file.stat().st_size:
                    file.unlink()
        for file in self._root.glob(f"*/{_META}"):
            if not file.stat().st_size and not [*file.parent.glob(f"*/{_META}")]:
                _remove_if_old(file.parent)
        for folder in self._root.glob("*/*"):
            # Its name is the last thing that MLflow writes of a new run, behind the token that it would be found by.
            last = (folder / _META, folder / "tags" / "mlflow.runName")
            is_made = all(file.exists() and file.stat().st_size for file in last)
            if (
                _RUN_ID.fullmatch(folder.name)
                and not is_made
                and not [*folder.glob("metrics/*"), *folder.glob("params/*")]
            ):
                _remove_if_old(folder)


def _remove_if_old(half_made: Path) -> None:
    """Remove what was being made and has nothing in it yet; not if somebody else may be making it just now."""
    if time.time() - half_made.stat().st_mtime > _MADE_WITHIN_S:
        shutil.rmtree(half_made)


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

    def begin(self, config: Mapping[str, Any]) -> None:
        """Make the run, or go on in it."""
        if self._run is not None:
            return
        import wandb

        self._run = wandb.init(
            project=self.project,
            mode=self.mode,
            dir=str(self._folder),
            id=self.token,
            resume="allow",
            config=self.described(config),
            reinit="create_new",
            **self.options,
        )
        self.run = self.token

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Give them to the run."""
        self._run.log({name: self._own(value) for name, value in values.items()}, step=step)

    def flush(self) -> bool:
        """Not known: its own process sends."""
        return False

    def restart(self) -> None:
        """Begin another run, which names this one."""
        self.close()
        super().restart()

    def close(self) -> None:
        """Wait until all is sent, or kept for `wandb sync`."""
        if self._run is not None:
            self._run.finish()
        self._run = None

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

    def begin(self, config: Mapping[str, Any]) -> None:
        """Make the run, or go on in it."""
        if self._run is not None:
            return
        import trackio

        options = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False, **self.options}
        self._run = trackio.init(
            project=self.project,
            name=self.run or self.name,
            config=self.described(config),
            resume="never" if self.run is None else "allow",
            **options,
        )
        self.run, self._id = self._run.name, self._run.id

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Give them to the run; of an image, where its file is."""
        self._run.log({name: _trackio_value(value) for name, value in values.items()}, step=step)

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


def _trackio_value(value: Value) -> Any:
    if isinstance(value, Histogram):
        return json.dumps({"counts": value.counts, "edges": value.edges})
    if isinstance(value, Image):
        return value.path
    return value if isinstance(value, str) or math.isfinite(value) else str(value)
