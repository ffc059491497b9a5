"""Parts of Ignite's ecosystem that are metrics, in each usage; see `parts`."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Events as IgniteEvents
from ignite.metrics import (
    Accuracy,
    ConfusionMatrix,
    EpochMetric,
    Loss,
    MeanSquaredError,
    MetricGroup,
    Precision,
    Recall,
    RunningAverage,
)
from ignite.metrics.metric import BatchWise, SingleEpochRunningBatchWise

from tests.ignite.parts import CLASSES, Script, part


@part
def running_average_of_the_loss(script: Script) -> Any:
    RunningAverage(output_transform=lambda loss: loss).attach(script.trainer, "loss")
    return round(script.run().metrics["loss"], 5)


@part
def running_average_of_a_metric(script: Script) -> Any:
    evaluator = script.evaluator()
    RunningAverage(Accuracy()).attach(evaluator, "accuracy")
    return round(evaluator.run(script.data).metrics["accuracy"], 5)


@part
def metrics_of_an_epoch(script: Script) -> Any:
    metrics = script.evaluator(accuracy=Accuracy(), loss=Loss(script.loss)).run(script.data).metrics
    return {name: round(value, 5) for name, value in metrics.items()}


@part
def metrics_of_each_batch(script: Script) -> Any:
    evaluator, noted = script.evaluator(), []
    Accuracy().attach(evaluator, "accuracy", usage=BatchWise())
    evaluator.add_event_handler(
        IgniteEvents.ITERATION_COMPLETED, lambda engine: noted.append(round(engine.state.metrics["accuracy"], 5))
    )
    evaluator.run(script.data)
    return noted


@part
def metrics_running_within_an_epoch(script: Script) -> Any:
    evaluator = script.evaluator()
    RunningAverage(Accuracy()).attach(evaluator, "accuracy", usage=SingleEpochRunningBatchWise())
    return round(evaluator.run(script.data, max_epochs=2).metrics["accuracy"], 5)


@part
def arithmetic_of_metrics(script: Script) -> Any:
    precision, recall = Precision(average=False), Recall(average=False)
    f1 = (precision * recall * 2 / (precision + recall + 1e-9)).mean()
    return round(float(script.evaluator(f1=f1).run(script.data).metrics["f1"]), 5)


@part
def confusion_matrix(script: Script) -> Any:
    return script.evaluator(matrix=ConfusionMatrix(CLASSES)).run(script.data).metrics["matrix"].tolist()


@part
def metric_of_all_outputs(script: Script) -> Any:
    def spread(predicted: torch.Tensor, wanted: torch.Tensor) -> float:
        return float(predicted.std() + wanted.float().std())

    return round(script.evaluator(spread=EpochMetric(spread)).run(script.data).metrics["spread"], 5)


@part
def group_of_metrics(script: Script) -> Any:
    group = MetricGroup({"accuracy": Accuracy(), "loss": Loss(script.loss)})
    found = script.evaluator(both=group).run(script.data).metrics
    return round(found["accuracy"], 5), round(found["loss"], 5)


@part
def metric_detached_again(script: Script) -> Any:
    error = MeanSquaredError(output_transform=lambda output: (output[0].argmax(1).float(), output[1].float()))
    evaluator = script.evaluator(error=error)
    first = round(evaluator.run(script.data).metrics["error"], 5)
    error.detach(evaluator)
    evaluator.state.metrics.clear()
    return first, sorted(evaluator.run(script.data).metrics), error.is_attached(evaluator)
