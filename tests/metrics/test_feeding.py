"""Every metric takes each batch once, and of an output what it knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric, MultioutputWrapper, Running

from allstep import Alone, Engine
from allstep.errors import MetricError
from allstep.metrics import Mean, Metrics, Sum
from allstep.metrics.feeding import Feeding
from tests.metrics.noting import Noting, alone, batches
from tests.metrics.worlds import on_one, over_ranks, take


class Counting(Metric):
    """How many batches and samples it was given."""

    full_state_update = False
    batches: torch.Tensor

    def __init__(self, sign: int = 1) -> None:
        super().__init__()
        self.sign = sign
        self.add_state("batches", torch.tensor(0), "sum")

    def update(self, preds: Any, target: Any = None) -> None:
        self.batches += self.sign

    def compute(self) -> torch.Tensor:
        return self.batches


def fed_with(entries: Mapping[str, Any], outputs: list[Any]) -> dict[str, Any]:
    return on_one(lambda: entries, outputs)


def test_a_metric_given_also_in_a_collection_takes_each_batch_once() -> None:
    one, other = Counting(), Counting(2)
    found = fed_with({"one": one, "c": MetricCollection({"a": one, "b": other}), "sum": one + other}, [1, 2, 3])
    assert {name: int(value) for name, value in found.items()} == {"one": 3, "c/a": 3, "c/b": 6, "sum": 9}


def test_a_member_given_beside_its_collection_takes_each_batch_once() -> None:
    one, other = Counting(), Counting()
    made = {"c": MetricCollection({"a": one, "b": other}), "other": other}
    found = over_ranks(lambda: made, [[1, 2, 3]])[0]
    assert {name: int(value) for name, value in found.items()} == {"c/a": 3, "c/b": 3, "other": 3}


def test_arithmetic_inside_a_collection_feeds_its_metrics_once() -> None:
    one = Counting()
    found = fed_with({"c": MetricCollection({"one": one, "twice": one + one})}, [1, 2])
    assert {name: int(value) for name, value in found.items()} == {"c/one": 2, "c/twice": 4}


def test_a_metric_beside_wrappers_that_pass_on_takes_each_batch_once() -> None:
    one = Counting()
    found = fed_with({"one": one, "range": MinMaxMetric(one)}, [1, 2])
    assert int(found["one"]) == int(found["range"]["raw"]) == 2


def test_a_metric_that_two_wrappers_would_feed_is_refused_and_both_are_named() -> None:
    one = Counting()
    with pytest.raises(MetricError, match=r"Counting is in Counting of metric 'one' and in Running of metric 'last'"):
        Feeding({"one": one, "last": Running(one, 2)}, None, {})


def test_a_metric_of_two_metrics_objects_of_an_engine_is_refused() -> None:
    one, engine = Counting(), Engine(take, coordinator=Alone())
    Metrics({"one": one}).attach(engine)
    with pytest.raises(MetricError, match=r"metric 'same' \(Counting\) is attached to this engine already, as 'one'"):
        Metrics({"same": one}).attach(engine, usage="running")
    assert len(engine.extension.reductions) == 1


def test_one_metric_with_two_transforms_is_refused() -> None:
    one = Counting()
    with pytest.raises(MetricError, match="one and other, for which output_transform has different functions"):
        Feeding({"one": one, "other": one}, {"one": lambda o: o, "other": lambda o: o}, {})
    same = lambda o: o  # noqa: E731
    Feeding({"one": one, "other": one}, {"one": same, "other": same}, {})
    Feeding({"one": one, "other": -one}, {"one": same}, {})


class ByKey(Metric):
    """Takes scores and labels by name, and nothing else."""

    full_state_update = False
    right: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.zeros(3), "sum")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.right[target] += (preds == target).float()

    def compute(self) -> torch.Tensor:
        return self.right


class Right(ByKey):
    def compute(self) -> torch.Tensor:
        return self.right.sum()


class Passing(MinMaxMetric):
    """A wrapper that is not known to pass on what it is given."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda: MinMaxMetric(Right()),
        lambda: Passing(Right()),
        lambda: Running(Right(), 5),
        lambda: ClasswiseWrapper(ByKey()),
        lambda: MinMaxMetric(Right() * 2),
        lambda: Passing(MinMaxMetric(Right())._base_metric),
    ],
    ids=["passes on", "takes anything", "keeps states", "by class", "of arithmetic", "nested"],
)
def test_a_wrapper_takes_of_a_dictionary_what_the_wrapped_metric_knows(wrapper: Any) -> None:
    output = {"preds": torch.tensor([0, 1]), "target": torch.tensor([0, 2]), "value": torch.tensor(1.0), "more": 3}
    found = fed_with({"it": wrapper(), "loss": Mean()}, [output, output])
    values = found["it"].values() if isinstance(found["it"], dict) else [found["it"]]
    assert max(float(value) for value in values) in (2.0, 4.0)


def test_a_wrapper_of_outputs_takes_them_by_name() -> None:
    class Total(Metric):
        full_state_update = False
        total: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.tensor(0.0), "sum")

        def update(self, preds: torch.Tensor) -> None:
            self.total += preds.sum()

        def compute(self) -> torch.Tensor:
            return self.total

    outputs = {"preds": torch.ones(4, 2), "target": torch.zeros(4)}
    found = fed_with({"it": MultioutputWrapper(Total(), 2)}, [outputs])
    assert found["it"].tolist() == [4.0, 4.0]


def test_samples_that_an_output_gives_are_the_weight() -> None:
    outputs = [{"value": 1.0, "samples": 3}, {"value": 5.0, "samples": torch.tensor(1)}]
    found = fed_with({"mean": Mean(), "sum": Sum()}, outputs)
    assert (float(found["mean"]), float(found["sum"])) == (2.0, 8.0)
    pairs = on_one(lambda: {"mean": Mean()}, [(1.0, 3), (5.0, 1)])
    assert float(pairs["mean"]) == 2.0


def test_an_entry_called_samples_that_is_no_number_leaves_the_batchs_size() -> None:
    def output(batch: torch.Tensor) -> dict[str, Any]:
        return {"value": batch.mean(), "samples": torch.zeros(2, 3, dtype=torch.uint8)}

    found = on_one(lambda: {"mean": Mean()}, [torch.ones(3), torch.zeros(1)], output)
    assert float(found["mean"]) == 0.75


def test_scores_and_labels_given_to_a_mean_by_position_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Mean takes one value.*2 arguments.*output_transform of its own"):
        fed_with({"mean": Mean()}, [(torch.ones(2), torch.zeros(2, dtype=torch.int64))])


def test_an_update_that_raises_says_which_metric_it_was_and_what_it_was_given() -> None:
    output = {"preds": torch.rand(3, 4), "target": torch.zeros(2, dtype=torch.int64), "loss": 1.0}
    with pytest.raises(RuntimeError, match="size of tensor") as caught:
        fed_with({"right": MulticlassAccuracy(4)}, [output])
    assert caught.value.__notes__[0] == (
        "(metric 'right', MulticlassAccuracy, was given (preds=float32 (3, 4), target=int64 (2,)); the output has loss "
        "too, which it does not know)"
    )
    with pytest.raises(TypeError) as missing:
        fed_with({"c": MetricCollection({"right": MulticlassAccuracy(4)})}, [{"scores": 1}])
    assert "(metric 'c', MulticlassAccuracy, was given (); the output has scores too" in missing.value.__notes__[0]


class Named(NamedTuple):
    value: torch.Tensor


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), Named, lambda x: {"value": x}, lambda x: [x]])
def test_metrics_that_keep_what_they_are_given_keep_no_graph(wrap: Any) -> None:
    class Keeping(Metric):
        full_state_update = False
        kept: list[Any]

        def __init__(self) -> None:
            super().__init__()
            self.add_state("kept", [], None)

        def update(self, value: Any) -> None:
            self.kept.append(value[0] if isinstance(value, list) else value)

        def compute(self) -> torch.Tensor:
            return torch.stack(self.kept).sum()

    metric = Keeping()
    engine = Engine(lambda engine, batch: wrap(torch.ones((), requires_grad=True) * batch), coordinator=Alone())
    Metrics({"it": metric}).attach(engine)
    engine.run([1.0, 2.0])
    assert [value.requires_grad for value in metric.kept] == [False, False]
    assert float(engine.state.metrics["it"]) == 3.0
    assert engine.state.output is not None


def test_two_metrics_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two metrics are named 'a\.b', a Counting and a Mean"):
        Metrics({"a": MetricCollection({"b": Counting()}), "a.b": Mean()})
    one = Counting()
    Metrics({"a": MetricCollection({"b": one}), "a.b": one})


def test_each_metric_takes_a_batch_once_however_often_arithmetic_names_it() -> None:
    one, other = Noting(), Noting()
    f1 = one * other * 2 / (one + other)
    engine = alone(Metrics({"one": one, "f1": f1}), [1, 2, 3])
    assert int(engine.state.metrics["one"]) == 3
    assert len(one.given) == len(other.given) == 3


def test_a_mapping_gives_each_metric_the_arguments_that_it_knows() -> None:
    metric = Noting()
    alone(
        Metrics({"it": metric, "loss": Mean()}),
        [torch.ones(2)],
        output_transform=lambda x: {"target": 1, "preds": 2, "value": x, "more": 3},
    )
    assert metric.given == [(2, 1)]


def test_metrics_may_have_transforms_of_their_own() -> None:
    metric = Noting()
    engine = alone(
        Metrics({"it": metric, "loss": Mean()}),
        batches(2),
        output_transform={"it": lambda o: (o[1].tolist(),), "loss": lambda o: o[0].mean()},
    )
    assert len(metric.given[0][0]) == 2
    assert 0 < float(engine.state.metrics["loss"]) < 1


def test_an_output_that_the_transform_leaves_out_enters_no_metric() -> None:
    engine = alone(Metrics({"n": Noting()}), [1, 2, 3, 4], output_transform=lambda x: None if x % 2 else x)
    assert int(engine.state.metrics["n"]) == 2
