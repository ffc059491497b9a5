"""`Track`: what a run tells of itself, written down once for each step, whatever ends the run and begins it again.

Contract: made on every rank alike and attached to the engine that trains. Only the main rank writes; what it writes is
of all ranks: results of `Metrics`, and a loss, which is a metric here. At each due iteration and at the events of
engines it notes values and goes on: a thread waits for devices and writes them to the `Journal`, and each tracker has
a `Delivery`. Nothing that these do reaches the training loop, errors and hanging included.

What is exact: a checkpoint of the engine has how many records the journal had (`state_dict` waits until they are
written), and which run of each tool they are in. The run that goes on from it cuts what is behind, there and in the
tools, and tells it again. A run that begins anew cuts all. What was cut is in withdrawn.jsonl.

Order: handlers are added when a run begins, ahead of those of a `Checkpoint` and behind all that were added before.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from allstep.checkpoint.references import objects_used_by
from allstep.engine import Engine, Events, RemovableEventHandle
from allstep.engine.events import check_count
from allstep.engine.state import is_one_number
from allstep.errors import ArgumentError, ArgumentTypeError, MissingExtraError
from allstep.metrics import Mean, Metrics, Usage
from allstep.parallel import unwrap
from allstep.tracking.delivery import Delivery
from allstep.tracking.journal import Journal
from allstep.tracking.model_values import learning_rates, model_values
from allstep.tracking.tracker import Tracker, tracker_for
from allstep.tracking.values import Picture, Record, check_value, count_values
from allstep.tracking.writing import JournalWriter
from allstep.world import World, internals

log = logging.getLogger("allstep.tracking")

_WRITTEN_WITHIN_S = 10.0
_PARTING_S = 2.0  # for an exception, which others are told of already


class Track:
    """Writes down what a run tells of itself, and gives it to tools.

    Args:
        folder: where the lines of JSON, images and what tools need are kept; seen by whichever rank is the main one.
        to: tools besides: "csv", "tensorboard", "mlflow", "wandb", "trackio", objects of these tools' classes, a
            `Tracker`, or a logger of Accelerate or Lightning.
        every: iterations from one record to the next.
        loss: a name for the mean, over all ranks and samples since the last record, of what the step returns, or of
            what it returns under this name in a mapping; or several names, each with a function from the step's output
            to a number. Over several ranks this is one collective at each record.
        rates: whether learning rates are recorded, of the optimizers that the step uses; or these, by name.
        weights: a module whose weights and gradients are recorded: their norms, of all together.
        histograms: also a histogram of each parameter and its gradient.
        values: `engine -> mapping`, called on the main rank at each record, for numbers of your own.
        config: what the run was started with, written down once.
        patience: seconds for which the end of a run waits for tools that are slow.

    Raises:
        ArgumentError: `every` is below 1, or a tool is unknown.
        ArgumentTypeError: something in `to` is no tracker.
        MissingExtraError: a tool is not installed.
    """

    state_differs_by_rank = True  # only the main rank's is more than nothing

    def __init__(
        self,
        folder: str | os.PathLike[str],
        to: Sequence[Any] = (),
        *,
        every: int = 50,
        loss: str | Mapping[str, Callable[[Any], Any]] | None = None,
        rates: bool | Mapping[str, Optimizer] = True,
        weights: nn.Module | None = None,
        histograms: bool = False,
        values: Callable[[Engine], Mapping[str, Any]] | None = None,
        config: Mapping[str, Any] | None = None,
        patience: float = 10.0,
    ) -> None:
        check_count("every", every, 1, "iterations")
        if isinstance(to, str) or not isinstance(to, Sequence):
            raise ArgumentTypeError(f"to is {to!r}; give a list, such as to=['tensorboard']")
        self.folder = Path(folder)
        self.every = every
        self.patience = patience
        self._trackers = _named(to)
        self._losses = {loss: partial(_named_output, loss)} if isinstance(loss, str) else dict(loss or {})
        self._rates = rates
        self._weights = None if weights is None else unwrap(weights)
        self._histograms = histograms
        self._values = values
        self._config = None if config is None else dict(config)
        self._engine: Engine | None = None
        self._evaluators: list[tuple[Engine, str]] = []
        self._handles: list[RemovableEventHandle] = []
        self._writer: JournalWriter | None = None
        self._deliveries: list[Delivery] = []
        self._loaded: Mapping[str, Any] | None = None
        self._told_until = 0  # the step of the last record

    @property
    def journal(self) -> Path:
        """The file with the lines of JSON."""
        return self.folder / "metrics.jsonl"

    def attach(self, engine: Engine) -> Track:
        """Record the runs of `engine`, the one that trains: each `every` iterations, and its metrics at epochs' ends.

        Raises:
            ArgumentError: it is attached already.
        """
        if self._engine is not None:
            raise ArgumentError("this Track is attached already; follow an evaluator with track.watch(evaluator)")
        self._engine = engine
        if self._losses:
            # Counting begins anew behind each record.
            begins = Events.ITERATION_STARTED(every=self.every, after=0)
            usage = Usage(begins, Events.ITERATION_COMPLETED, Events.ITERATION_COMPLETED(every=self.every))
            Metrics({name: Mean() for name in self._losses}).attach(engine, dict(self._losses), usage)
        engine.extension.add_state(self)
        engine.extension.surround(Events.STARTED, self._begin_run, _nothing)
        return self

    def watch(self, evaluator: Engine, prefix: str = "validation") -> Track:
        """Record an evaluator's metrics at the end of each of its runs, as "prefix/name", at the trainer's step."""
        self._evaluators.append((evaluator, prefix))
        return self

    # What a script tells

    def log(self, values: Mapping[str, Any]) -> None:
        """Record values at the present iteration: numbers, tensors of one number, texts. Only the main rank's count.

        Raises:
            ArgumentError: a name is reserved, or a value is several numbers.
            ArgumentTypeError: a value is none of these.
        """
        checked = {name: check_value(name, value) for name, value in values.items()}
        if self._writer is None or self._engine is None or not checked:
            return
        state = self._engine.state
        # Iterations of a group that is done again after an error have been told.
        if state.iteration < self._told_until or (
            state.iteration == self._told_until and self._engine.extension.is_repeated
        ):
            return
        self._told_until = state.iteration
        self._writer.put(Record(state.iteration, state.epoch, time.time(), checked))

    def histogram(self, name: str, numbers: Any, bins: int = 64) -> None:
        """Record how the numbers of a tensor or an array are spread. Raises ArgumentError when there are none."""
        if self._writer is not None:
            self.log({name: count_values(numbers, bins)})

    def image(self, name: str, pixels: Any) -> None:
        """Record a picture: (height, width) or (height, width, channels) with 1, 3 or 4 channels, uint8 or 0 to 1."""
        if self._writer is not None:
            copy = pixels.detach().clone() if hasattr(pixels, "detach") else pixels.copy()
            self.log({name: Picture(copy)})

    def close(self) -> None:
        """Write and send what there is, for `patience` seconds at the most, and end. A World's end does it too."""
        self._end(self.patience)
        deliveries, self._deliveries = self._deliveries, []
        deadline = time.monotonic() + self.patience
        for each in deliveries:
            _say_what_is_left(each, each.close(max(0.1, deadline - time.monotonic())), self.journal)
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    # The state

    def state_dict(self) -> dict[str, Any]:
        """How many records the journal has, and which runs of the tools they are in; nothing on other ranks.

        Between `load_state_dict` and the run it is what was loaded, since the journal is cut only when the run begins.
        """
        if self._loaded is not None:
            return dict(self._loaded)
        if self._writer is None:
            return {}
        self._writer.flush(_WRITTEN_WITHIN_S)
        trackers = {each.name: dict(each.identity) for each in self._deliveries}
        return {"records": self._writer.journal.count, "trackers": trackers}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, when a run begins."""
        self._loaded = state_dict

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what the ranks of a checkpoint saved, of which the main one's counts."""
        self.load_state_dict(next((each for each in states if each), {}))

    # During a run

    def _begin_run(self) -> None:
        engine = self._engine
        assert engine is not None
        loaded, self._loaded = self._loaded, None
        if engine.coordinator.rank != 0:
            return
        step = engine.state.iteration
        if self._writer is None:
            self._writer = JournalWriter(Journal(self.folder))
            _close_at_the_end(self)
        journal = self._writer.journal
        self._writer.flush(_WRITTEN_WITHIN_S)
        if loaded and "records" in loaded:
            if journal.count < loaded["records"]:
                log.warning(
                    "%s has %d records and had %d when the checkpoint was saved; the rest is lost",
                    *(journal.path, journal.count, loaded["records"]),
                )
            journal.cut(loaded["records"])
        else:
            journal.cut(journal.first_at(step + 1) if step else 0)
        self._told_until = journal.last_step
        if self._config is not None and not journal.count:
            self._writer.put(Record(step, engine.state.epoch, time.time(), {}, self._config))
        if not self._deliveries:
            identities = dict((loaded or {}).get("trackers", {}))
            self._deliveries = [Delivery(name, each, journal, identities.get(name)) for name, each in self._trackers]
        self._writer.deliveries = self._deliveries
        for delivery in self._deliveries:
            delivery.wake()
        self._listen(engine)

    def _listen(self, engine: Engine) -> None:
        for handle in self._handles:
            handle.remove()
        if self._rates is True:
            found = objects_used_by([engine.process_function])
            self._rates = {name: each for name, each in found if isinstance(each, Optimizer)}
        ends = Events.TERMINATE | Events.COMPLETED | Events.INTERRUPT
        self._handles = [
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self._tell_iteration),
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._tell_epoch),
            engine.add_event_handler(ends, lambda: self._end(self.patience)),
            engine.add_event_handler(Events.EXCEPTION_RAISED, lambda *_: self._end(_PARTING_S)),
            *(
                evaluator.add_event_handler(Events.COMPLETED, self._tell_evaluation, prefix)
                for evaluator, prefix in self._evaluators
            ),
        ]

    def _tell_iteration(self, engine: Engine) -> None:
        metrics = engine.state.metrics
        values = {name: metrics[name] for name in self._losses if name in metrics}
        if isinstance(self._rates, Mapping):
            values.update(learning_rates(self._rates))
        if self._weights is not None:
            values.update(model_values(self._weights, histograms=self._histograms))
        if self._values is not None:
            values.update(self._values(engine))
        self.log(values)

    def _tell_epoch(self, engine: Engine) -> None:
        metrics = engine.state.metrics
        self.log(_numbers({name: value for name, value in metrics.items() if name not in self._losses}))

    def _tell_evaluation(self, evaluator: Engine, prefix: str) -> None:
        self.log({f"{prefix}/{name}": value for name, value in _numbers(evaluator.state.metrics).items()})

    def _end(self, patience: float) -> None:
        """Wait a little for what is under way."""
        if self._writer is None:
            return
        deadline = time.monotonic() + patience
        self._writer.flush(patience)
        for each in self._deliveries:
            each.wait(max(0.0, deadline - time.monotonic()))

    def _close_with_world(self, failed: bool) -> None:
        self.close()


def send(folder: str | os.PathLike[str], to: Sequence[Any], patience: float = 600.0) -> int:
    """Send what a run has left in its folder, because a tool was away; nothing is trained.

    Args:
        folder: of the Track.
        to: tools, as the Track had them.
        patience: seconds for which it waits.

    Returns:
        The number of records that are still not sent.
    """
    journal = Journal(Path(folder))
    deliveries = [Delivery(name, each, journal) for name, each in _named(to)]
    deadline = time.monotonic() + patience
    for each in deliveries:
        each.wait(max(0.0, deadline - time.monotonic()))
    return max((each.close(max(1.0, deadline - time.monotonic())) for each in deliveries), default=0)


def _named_output(name: str, output: Any) -> Any:
    return output[name] if isinstance(output, Mapping) else output


def _named(to: Sequence[Any]) -> list[tuple[str, Tracker]]:
    """The trackers with the names that they have in messages, files and checkpoints."""
    named: dict[str, Tracker] = {}
    for given in to:
        tracker = tracker_for(given)
        if tracker is None:
            continue
        package = getattr(tracker, "package", None)
        if package is not None and find_spec(package) is None:
            raise MissingExtraError(f"{type(tracker).__name__} needs {package}: pip install 'allstep[{package}]'")
        # Of another library's logger its own name, not that of what makes it fit.
        first = type(getattr(tracker, "logger", tracker)).__name__.lower()
        name, number = first, 1
        while name in named:
            number += 1
            name = f"{first}-{number}"
        named[name] = tracker
    return list(named.items())


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some metrics that are one number, or a text."""
    return {name: value for name, value in metrics.items() if isinstance(value, str) or is_one_number(value)}


def _say_what_is_left(delivery: Delivery, left: int, journal: Path) -> None:
    if left:
        log.warning(
            "%d records were not taken by %s in time; they are in %s, and the next start of the script or "
            "allstep.tracking.send(folder, to) sends them",
            *(left, delivery.name, journal),
        )


def _close_at_the_end(track: Track) -> None:
    """Have it closed with the World, or where there is none with the interpreter; it is not kept alive by this."""
    world = World.current()
    if world is not None:
        internals(world).before_close(weakref.WeakMethod(track._close_with_world))
        return
    reference = weakref.ref(track)

    def close() -> None:
        alive = reference()
        if alive is not None:
            alive.close()

    atexit.register(close)


def _nothing() -> None:
    """What follows the handlers of STARTED."""
