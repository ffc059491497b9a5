"""Parts of Ignite's ecosystem, each as a user's script has it, with the import of the engine left open.

A part is a function of the names that the script imports, and of what splits the data over ranks. What it gives is
compared between Ignite alone, this package on one process and this package on two.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ignite.distributed as idist
import torch
from ignite.contrib.engines import common
from ignite.engine import Events as IgniteEvents
from ignite.handlers import (
    BasicTimeProfiler,
    Checkpoint,
    ConcatScheduler,
    CosineAnnealingScheduler,
    DiskSaver,
    EarlyStopping,
    EMAHandler,
    EpochOutputStore,
    FastaiLRFinder,
    HandlersTimeProfiler,
    LinearCyclicalScheduler,
    ModelCheckpoint,
    ParamGroupScheduler,
    PiecewiseLinear,
    ProgressBar,
    ReduceLROnPlateauScheduler,
    TensorboardLogger,
    TerminateOnNan,
    TimeLimit,
    Timer,
    create_lr_scheduler_with_warmup,
    global_step_from_engine,
)
from ignite.handlers.checkpoint import CheckpointEvents
from ignite.handlers.param_scheduler import LRScheduler
from ignite.handlers.state_param_scheduler import StepStateScheduler
from ignite.handlers.tensorboard_logger import OptimizerParamsHandler, OutputHandler
from ignite.metrics import (
    Accuracy,
    Frequency,
    Loss,
    RunningAverage,
)
from torch import nn

BATCHES, SAMPLES, CLASSES = 4, 8, 3

Part = Callable[["Script"], Any]
PARTS: dict[str, Part] = {}


def part(function: Part) -> Part:
    PARTS[function.__name__] = function
    return function


class Script:
    """What every script begins with: a model, an optimizer, a trainer, an evaluator and this rank's data."""

    def __init__(self, names: ModuleType, folder: Path) -> None:
        self.names = names
        self.folder = folder
        torch.manual_seed(3)
        self.bare = nn.Linear(5, CLASSES)
        self.model = idist.auto_model(self.bare)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.loss = nn.CrossEntropyLoss()
        self.trainer = names.create_supervised_trainer(self.model, self.optimizer, self.loss)
        draw = torch.Generator().manual_seed(5)
        rank, ranks = idist.get_rank(), idist.get_world_size()
        whole = [
            (torch.randn(SAMPLES, 5, generator=draw), torch.randint(0, CLASSES, (SAMPLES,), generator=draw))
            for _ in range(BATCHES)
        ]
        self.data = [(x[rank::ranks], y[rank::ranks]) for x, y in whole]

    def evaluator(self, **metrics: Any) -> Any:
        return self.names.create_supervised_evaluator(self.model, metrics)

    def run(self, epochs: int = 2) -> Any:
        return self.trainer.run(self.data, max_epochs=epochs)

    def weights(self) -> list[float]:
        return [round(value, 5) for value in self.bare.weight.detach().flatten().tolist()]

    def rates(self, event: Any = IgniteEvents.ITERATION_STARTED) -> list[float]:
        """Rates of the optimizer, noted in each iteration."""
        noted: list[float] = []
        self.trainer.add_event_handler(event, lambda: noted.append(round(self.optimizer.param_groups[0]["lr"], 6)))
        return noted

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob("*") if path.is_file())


def whole_loss(output: Any) -> Any:
    """The mean loss over all ranks, as one process has it."""
    return idist.all_reduce(float(output)) / idist.get_world_size()


# Progress and logs


@part
def progress_bar(script: Script) -> Any:
    screen = io.StringIO()
    ProgressBar(file=screen, ncols=80).attach(script.trainer, output_transform=lambda loss: {"loss": loss})
    script.run()
    shown = screen.getvalue()
    return [f"[{n}/{BATCHES}]" in shown for n in range(1, BATCHES + 1)], "Epoch [2/2]" in shown


@part
def tensorboard_logger(script: Script) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    RunningAverage(output_transform=lambda loss: loss).attach(script.trainer, "loss")
    if idist.get_rank() == 0:
        logger = TensorboardLogger(log_dir=str(script.folder))
        losses = OutputHandler("train", metric_names=["loss"])
        logger.attach(script.trainer, losses, IgniteEvents.ITERATION_COMPLETED(every=2))
        logger.attach(script.trainer, OptimizerParamsHandler(script.optimizer), IgniteEvents.ITERATION_STARTED)
        script.trainer.add_event_handler(IgniteEvents.COMPLETED, logger.close)
    script.run()
    if idist.get_rank():
        return None
    read = EventAccumulator(str(script.folder)).Reload()
    return {tag: [(event.step, round(event.value, 5)) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@part
def tensorboard_of_common_handlers(script: Script) -> Any:
    evaluator = script.evaluator(accuracy=Accuracy())
    script.trainer.add_event_handler(IgniteEvents.EPOCH_COMPLETED, lambda: evaluator.run(script.data))
    if idist.get_rank() == 0:
        logger = common.setup_tb_logging(str(script.folder), script.trainer, script.optimizer, {"val": evaluator})
        script.trainer.add_event_handler(IgniteEvents.COMPLETED, logger.close)
    script.run()
    return len(script.files()) if idist.get_rank() == 0 else None


# Checkpoints


@part
def model_checkpoint(script: Script) -> Any:
    handler = ModelCheckpoint(script.folder, "last", n_saved=2, require_empty=False)
    script.trainer.add_event_handler(IgniteEvents.EPOCH_COMPLETED, handler, {"model": script.model})
    script.run(3)
    return script.files()


@part
def checkpoint_by_score(script: Script) -> Any:
    evaluator = script.evaluator(loss=Loss(script.loss))
    handler = Checkpoint(
        {"model": script.model},
        DiskSaver(str(script.folder), require_empty=False),
        score_function=lambda engine: -engine.state.metrics["loss"],
        score_name="score",
        global_step_transform=global_step_from_engine(script.trainer),
    )
    evaluator.add_event_handler(IgniteEvents.COMPLETED, handler)
    script.trainer.add_event_handler(IgniteEvents.EPOCH_COMPLETED, lambda: evaluator.run(script.data))
    script.run(3)
    return script.files()


@part
def saved_checkpoint_event(script: Script) -> Any:
    script.trainer.register_events(*CheckpointEvents)
    handler = Checkpoint({"model": script.model}, DiskSaver(str(script.folder), require_empty=False))
    script.trainer.add_event_handler(IgniteEvents.EPOCH_COMPLETED, handler)
    heard: list[int] = []
    script.trainer.add_event_handler(Checkpoint.SAVED_CHECKPOINT, lambda engine: heard.append(engine.state.epoch))
    script.run()
    return heard, Checkpoint.SAVED_CHECKPOINT == "SAVED_CHECKPOINT"


@part
def trainer_saved_and_loaded(script: Script) -> Any:
    saver = DiskSaver(str(script.folder), require_empty=False)
    handler = Checkpoint({"trainer": script.trainer, "model": script.bare}, saver, n_saved=None)
    script.trainer.add_event_handler(IgniteEvents.EPOCH_COMPLETED, handler)
    script.run()
    idist.barrier()
    saved = torch.load(script.folder / "checkpoint_4.pt")
    Checkpoint.load_objects({"trainer": script.trainer, "model": script.bare}, saved)
    before = script.trainer.state.iteration
    script.run()
    return before, script.trainer.state.iteration, script.weights()


# Searching, timing


@part
def learning_rate_finder(script: Script) -> Any:
    finder = FastaiLRFinder()
    saved = {"model": script.model, "optimizer": script.optimizer}
    ranks = idist.get_world_size()  # the finder adds up what its ranks give
    with finder.attach(script.trainer, saved, output_transform=lambda loss: loss / ranks, num_iter=6) as trainer:
        trainer.run(script.data)
    found = finder.get_results()
    return [round(rate, 5) for rate in found["lr"]], [round(loss, 4) for loss in found["loss"]], script.weights()


@part
def basic_time_profiler(script: Script) -> Any:
    profiler = BasicTimeProfiler()
    profiler.attach(script.trainer)
    script.run()
    results = profiler.get_results()
    return sorted(results), len(profiler.dataflow_times), float(results["processing_stats"]["total"]) > 0


@part
def handlers_time_profiler(script: Script) -> Any:
    profiler = HandlersTimeProfiler()
    profiler.attach(script.trainer)
    called: list[int] = []

    def own_handler(engine: Any) -> None:
        called.append(engine.state.iteration)

    script.trainer.add_event_handler(IgniteEvents.ITERATION_COMPLETED(every=2), own_handler)
    script.run()
    rows = [row[:2] for row in profiler.get_results() if "own_handler" in str(row[0])]
    return called, rows


@part
def timer(script: Script) -> Any:
    clock = Timer(average=True)
    clock.attach(
        script.trainer,
        start=IgniteEvents.STARTED,
        resume=IgniteEvents.ITERATION_STARTED,
        pause=IgniteEvents.ITERATION_COMPLETED,
        step=IgniteEvents.ITERATION_COMPLETED,
    )
    script.run()
    return clock.step_count, clock.value() > 0


@part
def frequency(script: Script) -> Any:
    Frequency(output_transform=lambda loss: SAMPLES).attach(script.trainer, name="samples")
    return script.run().metrics["samples"] > 0


# Ends


@part
def early_stopping(script: Script) -> Any:
    evaluator = script.evaluator(accuracy=Accuracy())
    evaluator.add_event_handler(IgniteEvents.COMPLETED, EarlyStopping(2, lambda engine: 1.0, script.trainer))
    script.trainer.add_event_handler(IgniteEvents.EPOCH_COMPLETED, lambda: evaluator.run(script.data))
    return script.run(9).epoch


@part
def terminate_on_nan(script: Script) -> Any:
    trainer = script.names.Engine(lambda engine, batch: math.nan if engine.state.iteration == 4 else 1.0)
    trainer.add_event_handler(
        IgniteEvents.EPOCH_COMPLETED | IgniteEvents.ITERATION_COMPLETED(every=4), TerminateOnNan()
    )
    state = trainer.run(script.data, max_epochs=3)
    return state.epoch, state.iteration


@part
def time_limit(script: Script) -> Any:
    limit = TimeLimit(60)
    limit.start_time -= 61
    script.trainer.add_event_handler(IgniteEvents.EPOCH_COMPLETED, limit)
    return script.run(5).epoch


# Averages and schedules


@part
def exponential_moving_average(script: Script) -> Any:
    handler = EMAHandler(script.bare, momentum=0.1)
    handler.attach(script.trainer, name="momentum", event=IgniteEvents.ITERATION_COMPLETED(every=2))
    state = script.run()
    averaged = handler.ema_model.weight.flatten().tolist()
    return round(state.momentum, 6), [round(value, 5) for value in averaged]


def _scheduled(script: Script, scheduler: Any) -> Any:
    script.trainer.add_event_handler(IgniteEvents.ITERATION_STARTED, scheduler)
    noted = script.rates()
    script.run()
    return noted, script.weights()


@part
def linear_cyclical_schedule(script: Script) -> Any:
    return _scheduled(script, LinearCyclicalScheduler(script.optimizer, "lr", 0.0, 0.1, 4))


@part
def cosine_schedule(script: Script) -> Any:
    return _scheduled(script, CosineAnnealingScheduler(script.optimizer, "lr", 0.1, 0.0, 8))


@part
def piecewise_linear_schedule(script: Script) -> Any:
    return _scheduled(script, PiecewiseLinear(script.optimizer, "lr", [(0, 0.0), (3, 0.1), (8, 0.01)]))


@part
def concatenated_schedules(script: Script) -> Any:
    first = LinearCyclicalScheduler(script.optimizer, "lr", 0.0, 0.1, 4)
    second = CosineAnnealingScheduler(script.optimizer, "lr", 0.1, 0.0, 8)
    return _scheduled(script, ConcatScheduler([first, second], durations=[4]))


@part
def torch_schedule_with_warmup(script: Script) -> Any:
    inner = LRScheduler(torch.optim.lr_scheduler.ExponentialLR(script.optimizer, gamma=0.9))
    return _scheduled(script, create_lr_scheduler_with_warmup(inner, warmup_start_value=0.0, warmup_duration=3))


@part
def schedules_by_parameter_group(script: Script) -> Any:
    first = LinearCyclicalScheduler(script.optimizer, "lr", 0.0, 0.1, 4, param_group_index=0)
    return _scheduled(script, ParamGroupScheduler([first]))


@part
def schedule_by_plateau(script: Script) -> Any:
    evaluator = script.evaluator(loss=Loss(script.loss))
    scheduler = ReduceLROnPlateauScheduler(
        script.optimizer, metric_name="loss", factor=0.5, patience=0, threshold=1e9, threshold_mode="abs"
    )
    evaluator.add_event_handler(IgniteEvents.COMPLETED, scheduler)
    script.trainer.add_event_handler(IgniteEvents.EPOCH_COMPLETED, lambda: evaluator.run(script.data))
    noted = script.rates(IgniteEvents.EPOCH_STARTED)
    script.run(4)
    return noted


@part
def state_parameter_schedule(script: Script) -> Any:
    scheduler = StepStateScheduler(param_name="noise", initial_value=1.0, gamma=0.5, step_size=2)
    scheduler.attach(script.trainer, IgniteEvents.ITERATION_COMPLETED)
    return script.run().noise


# Events


@part
def events_of_the_script(script: Script) -> Any:
    class Backward(script.names.EventEnum):
        BACKWARD_STARTED = "backward_started"
        BACKWARD_COMPLETED = "backward_completed"

    heard: list[Any] = []

    def step(engine: Any, batch: Any) -> None:
        engine.state.backward += 1
        engine.fire_event(Backward.BACKWARD_COMPLETED)
        engine.fire_event("plain")

    trainer = script.names.Engine(step)
    trainer.register_events(*Backward, "plain", event_to_attr={Backward.BACKWARD_COMPLETED: "backward"})
    trainer.add_event_handler(Backward.BACKWARD_COMPLETED(every=3), lambda engine: heard.append(engine.state.iteration))
    trainer.add_event_handler("plain", lambda: heard.append("plain"))
    trainer.run(script.data)
    return heard


@part
def filtered_and_joined_events(script: Script) -> Any:
    events, heard = script.names.Events, []
    chosen = events.STARTED | events.EPOCH_COMPLETED(once=2) | events.ITERATION_COMPLETED(every=3, after=2)
    chosen = chosen | events.ITERATION_STARTED(event_filter=lambda engine, count: count == 5)

    @script.trainer.on(chosen)
    def note(engine: Any) -> None:
        heard.append((engine.last_event_name.name, engine.state.iteration))

    script.run()
    return heard


@part
def interrupted_run(script: Script) -> Any:
    script.trainer.add_event_handler(IgniteEvents.ITERATION_COMPLETED(once=5), script.trainer.interrupt)
    first = script.run().iteration if idist.get_world_size() == 1 else 5
    return first, script.run().iteration, script.weights()


@part
def output_store(script: Script) -> Any:
    store = EpochOutputStore(output_transform=whole_loss)
    store.attach(script.trainer, "losses")
    return [round(loss, 5) for loss in script.run().losses]


# All of them together


@part
def common_training_handlers(script: Script) -> Any:
    common.setup_common_training_handlers(
        script.trainer,
        to_save={"model": script.model, "trainer": script.trainer},
        save_every_iters=3,
        output_path=str(script.folder),
        lr_scheduler=torch.optim.lr_scheduler.StepLR(script.optimizer, step_size=3, gamma=0.5),
        output_names=["loss"],
        with_pbars=False,
        clear_cuda_cache=False,
    )
    script.trainer.state.saved = None
    state = script.run()
    idist.barrier()
    return script.files(), round(state.metrics["loss"], 5), script.weights()


@part
def best_model_and_early_stop(script: Script) -> Any:
    evaluator = script.evaluator(accuracy=Accuracy())
    common.save_best_model_by_val_score(
        str(script.folder), evaluator, script.bare, "accuracy", trainer=script.trainer, n_saved=1
    )
    common.add_early_stopping_by_val_score(1, evaluator, script.trainer, "accuracy")
    script.trainer.add_event_handler(IgniteEvents.EPOCH_COMPLETED, lambda: evaluator.run(script.data))
    epochs = script.run(20).epoch
    idist.barrier()
    return epochs, script.files()
