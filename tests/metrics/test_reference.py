"""Common metrics over uneven and empty ranks equal torchmetrics alone in one process, and scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics import Metric, classification, image, regression, retrieval, text

from tests.metrics.worlds import all_same_bits, deal, over_ranks

CLASSES = 4


@dataclass(frozen=True)
class Case:
    """`make` gives the metric, `batches` what it takes; `expected` computes it from all of it by other means."""

    make: Callable[[], Metric]
    batches: Callable[[], list[Any]]
    expected: Callable[..., Any] | None = None
    tolerance: float = 1e-6

    def by_torchmetrics(self) -> Any:
        """What torchmetrics itself computes of all batches, without allstep."""
        metric = self.make()
        for batch in self.batches():
            metric.update(*batch)
        return metric.compute()


def classes() -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    sizes = [5, 1, 8, 3, 3, 7, 2]
    return [
        (torch.rand(n, CLASSES, generator=generator), torch.randint(CLASSES, (n,), generator=generator)) for n in sizes
    ]


def binary() -> list[Any]:
    return [(scores[:, 0], (target > 1).long()) for scores, target in classes()]


def numbers() -> list[Any]:
    return [(scores[:, 0] * 10, scores[:, 0] * 7 + scores[:, 1] * 3) for scores, _ in classes()]


def queries() -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.rand(6, generator=generator), torch.randint(2, (6,), generator=generator), torch.full((6,), at))
        for at in range(7)
    ]


def pictures() -> list[Any]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.rand(n, 1, 16, 16, generator=generator), torch.rand(n, 1, 16, 16, generator=generator))
        for n in (2, 1, 3)
    ]


def sentences() -> list[Any]:
    said = ["the cat sat on the mat", "a dog ran home", "rain falls in spring", "we all go home now", "no"]
    meant = ["a cat sat on the mat", "the dog ran back home", "rain fell in spring", "we go home now", "yes it is"]
    return [([one], [other]) for one, other in zip(said, meant, strict=True)]


def references() -> list[Any]:
    return [(said, [meant]) for said, meant in sentences()]


def logits() -> list[Any]:
    generator = torch.Generator().manual_seed(9)
    return [
        (torch.randn(n, 5, 11, generator=generator), torch.randint(11, (n, 5), generator=generator)) for n in (1, 3, 2)
    ]


def labels(scores: Any) -> Any:
    return np.argmax(scores, axis=1)


CASES: dict[str, Case] = {
    "accuracy": Case(
        lambda: classification.MulticlassAccuracy(CLASSES, average="micro"),
        classes,
        lambda s, y: sk.accuracy_score(y, labels(s)),
    ),
    "precision": Case(
        lambda: classification.MulticlassPrecision(CLASSES),
        classes,
        lambda s, y: sk.precision_score(y, labels(s), average="macro", zero_division=0),
    ),
    "recall": Case(
        lambda: classification.MulticlassRecall(CLASSES),
        classes,
        lambda s, y: sk.recall_score(y, labels(s), average="macro", zero_division=0),
    ),
    "f1": Case(
        lambda: classification.MulticlassF1Score(CLASSES),
        classes,
        lambda s, y: sk.f1_score(y, labels(s), average="macro", zero_division=0),
    ),
    "confusion matrix": Case(
        lambda: classification.MulticlassConfusionMatrix(CLASSES),
        classes,
        lambda s, y: sk.confusion_matrix(y, labels(s)),
        0,
    ),
    "cohen kappa": Case(
        lambda: classification.MulticlassCohenKappa(CLASSES), classes, lambda s, y: sk.cohen_kappa_score(y, labels(s))
    ),
    "matthews": Case(
        lambda: classification.MulticlassMatthewsCorrCoef(CLASSES),
        classes,
        lambda s, y: sk.matthews_corrcoef(y, labels(s)),
    ),
    "auroc": Case(classification.BinaryAUROC, binary, lambda s, y: sk.roc_auc_score(y, s)),
    "average precision": Case(
        classification.BinaryAveragePrecision, binary, lambda s, y: sk.average_precision_score(y, s)
    ),
    "roc": Case(classification.BinaryROC, binary),
    "calibration error": Case(classification.BinaryCalibrationError, binary),
    "mean squared error": Case(regression.MeanSquaredError, numbers, lambda p, y: sk.mean_squared_error(y, p), 1e-5),
    "mean absolute error": Case(regression.MeanAbsoluteError, numbers, lambda p, y: sk.mean_absolute_error(y, p), 1e-5),
    "r2": Case(regression.R2Score, numbers, lambda p, y: sk.r2_score(y, p), 1e-4),
    "explained variance": Case(
        regression.ExplainedVariance, numbers, lambda p, y: sk.explained_variance_score(y, p), 1e-4
    ),
    "pearson": Case(regression.PearsonCorrCoef, numbers, lambda p, y: np.corrcoef(p, y)[0, 1], 1e-4),
    "spearman": Case(regression.SpearmanCorrCoef, numbers, None, 1e-5),
    "retrieval map": Case(retrieval.RetrievalMAP, queries),
    "retrieval ndcg": Case(retrieval.RetrievalNormalizedDCG, queries),
    "psnr": Case(lambda: image.PeakSignalNoiseRatio(data_range=1.0), pictures, None, 1e-5),
    "ssim": Case(lambda: image.StructuralSimilarityIndexMeasure(data_range=1.0), pictures, None, 1e-5),
    "bleu": Case(text.BLEUScore, references),
    "word error rate": Case(text.WordErrorRate, sentences),
    "edit distance": Case(text.EditDistance, sentences),
    "perplexity": Case(text.Perplexity, logits, None, 1e-5),
}


def joined(batches: list[Any]) -> list[Any]:
    return [torch.cat(column).numpy() for column in zip(*batches, strict=True)]


def transform_of(case: Case) -> Callable[[Any], Any] | None:
    if case.batches is queries:
        return lambda batch: {"preds": batch[0], "target": batch[1], "indexes": batch[2]}
    return None


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_metric_over_ranks_is_that_of_all_samples(name: str, world_size: int) -> None:
    case = CASES[name]
    batches, transform, single = case.batches(), transform_of(case), case.by_torchmetrics()
    empties: list[int | None] = [None] if world_size == 1 else [None, 0, world_size - 1]
    for empty in empties:
        found = over_ranks(lambda: {name: case.make()}, deal(batches, world_size, empty=empty), transform)
        assert all_same_bits(found)
        torch.testing.assert_close(found[0][name], single, rtol=case.tolerance, atol=case.tolerance)
        if case.expected is not None:
            expected = torch.as_tensor(np.asarray(case.expected(*joined(batches)), dtype=np.float64))
            tolerance = max(case.tolerance, 1e-6)
            torch.testing.assert_close(found[0][name].double(), expected, rtol=tolerance, atol=1e-6)
