"""What a tool for following runs is to `Track`: the `Tracker` protocol, and other libraries' loggers made to fit it.

Contract: a tracker is called by one thread of its own, never by the training loop, on the main rank only. It may block
and raise: what it did not take stays in the journal and is sent again. After a kill nobody knows whether the last
records have arrived, nor can the tool forget those behind the checkpoint by itself. How a tracker sees to it that no
step is there twice is its choice of further methods:

- `withdraw(step)`: takes back all at `step` or later. The best, where the tool permits it.
- `log_again(values, step)`: logs what is not there yet.
- `restart()`: begins another run of the tool, which names the one before; it is sent everything from the beginning.

Without any of them records are sent again under their steps, for a tool that overwrites by step.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from allstep.errors import ArgumentError, ArgumentTypeError
from allstep.tracking.values import Value


@runtime_checkable
class Tracker(Protocol):
    """A tool that keeps series of values.

    It may also have, besides `withdraw(step)`, `log_again(values, step)` and `restart()`, one of which is called after
    a kill:

    - `open(folder)`, called first, with the folder of the Track.
    - `begin(config)`, called ahead of values, so that `state_dict` then says which run it is.
    - `configure(config)`, called where the configuration was told.
    - `log_time(seconds)`, called ahead of `log` with when the record was made, in seconds since 1970.
    - `flush()`, called after some records, which returns False where it does not know that they have arrived.
    - `close()`.
    """

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Keep values at a step: numbers, texts, `Histogram`, `Image`; leave out what the tool has no place for."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Which run of the tool this is, as JSON takes it."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Go on in that run; called before the first `log`."""
        ...


class _ForeignLogger:
    """What other libraries' loggers have in common here: numbers, and no identity to go on with."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Whether it goes on in its run is said where the logger is made."""


class AccelerateLogger(_ForeignLogger):
    """A tracker of Hugging Face Accelerate, as it is."""

    def open(self, folder: Path) -> None:
        """Begin; newer ones wait for it."""
        start = getattr(self.logger, "start", None)
        if start is not None:
            start()

    def configure(self, config: Mapping[str, Any]) -> None:
        """Keep the configuration."""
        self.logger.store_init_configuration(dict(config))

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Keep numbers and texts."""
        self.logger.log({name: value for name, value in values.items() if isinstance(value, int | float | str)}, step)

    def close(self) -> None:
        """End it."""
        self.logger.finish()


class LightningLogger(_ForeignLogger):
    """A logger of Lightning or Fabric, as it is."""

    def configure(self, config: Mapping[str, Any]) -> None:
        """Keep the configuration, where the logger has a place for it."""
        with suppress(NotImplementedError):
            self.logger.log_hyperparams(dict(config))

    def log(self, values: Mapping[str, Value], step: int) -> None:
        """Keep numbers."""
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        if numbers:
            self.logger.log_metrics(numbers, step)

    def flush(self) -> None:
        """Have it write what it holds."""
        self.logger.save()

    def close(self) -> None:
        """End it."""
        self.logger.finalize("success")


def tracker_for(given: Any) -> Tracker | None:
    """The tracker that was meant; None for "jsonl", the journal itself, which is always there.

    Raises:
        ArgumentError: an unknown name.
        ArgumentTypeError: what was given is no tracker.
    """
    if isinstance(given, str):
        return _by_name(given)
    if hasattr(given, "store_init_configuration") and hasattr(given, "log"):
        return AccelerateLogger(given)
    if hasattr(given, "log_metrics") and hasattr(given, "log_hyperparams"):
        return LightningLogger(given)
    if isinstance(given, Tracker) and not isinstance(given, type):
        return given
    raise ArgumentTypeError(
        f"to has {given!r}; give a name ({', '.join(NAMES)}), an object with log(values, step), state_dict and "
        "load_state_dict, or a logger of Accelerate or Lightning"
    )


NAMES = ("jsonl", "csv", "tensorboard", "mlflow", "wandb", "trackio")


def _by_name(name: str) -> Tracker | None:
    # Imported here: none of these tools is needed for another one.
    from allstep.tracking import files, services

    known: dict[str, Any] = {
        "csv": files.CSV,
        "tensorboard": files.TensorBoard,
        "mlflow": services.MLflow,
        "wandb": services.WandB,
        "trackio": services.Trackio,
    }
    if name == "jsonl":
        return None
    if name not in known:
        raise ArgumentError(f"to has {name!r}; it must be one of {', '.join(NAMES)}, or a tracker")
    made: Tracker = known[name]()
    return made
