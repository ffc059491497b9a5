"""Kind 1: how many samples a batch has, whatever it is made of and whatever its sampler said of it."""

from __future__ import annotations

import operator
from collections import UserDict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence

from allstep import Engine, Events, World
from allstep.errors import DataError, RanksError
from allstep.metrics import Mean, Metrics
from allstep.testing import run_ranks
from tests.situations.fitting import VALUES, Numbers, fit, fitted, in_groups, leave_out_bad, mean_over
from tests.situations.judge import Judge

SIZES = (3, 1, 2, 1, 4, 1, 2, 5, 1, 1, 3, 2)
"""Samples in batches that a stream gives, whose values are counted up from 0."""


def stream_of(make: Any) -> list[Any]:
    """Batches of `SIZES`, each made of the values of its samples."""
    batches, done = [], 0
    for size in SIZES:
        batches.append(make([float(value) for value in range(done, done + size)]))
        done += size
    return batches


def dealt(world: World, batches: Sequence[Any]) -> list[Any]:
    """This rank's batches, so that six batches in a row, of all ranks, make one optimizer step."""
    return list(batches[world.rank :: world.world_size])


def right_over_stream() -> float:
    """Two optimizer steps, of six batches each."""
    values = [float(value) for value in range(sum(SIZES))]
    return fitted([values[: sum(SIZES[:6])], values[sum(SIZES[:6]) :]])


# Batches that are lists


def detections(values: list[float]) -> list[dict[str, Any]]:
    return [{"boxes": torch.zeros(at, 4), "v": value} for at, value in enumerate(values)]


def images(values: list[float]) -> list[torch.Tensor]:
    return [torch.full((3, 8, 8), value) for value in values]


def images_and_targets(values: list[float]) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    return images(values), detections(values)


def train_on_detections(world: World) -> float:
    data = dealt(world, stream_of(detections))
    return fit(world, data, lambda b: [d["v"] for d in b], accumulate=6 // world.world_size)


def train_on_images(world: World) -> float:
    data = dealt(world, stream_of(images))
    return fit(world, data, lambda b: [i[0, 0, 0] for i in b], accumulate=6 // world.world_size)


def train_on_images_and_targets(world: World) -> float:
    data = dealt(world, stream_of(images_and_targets))
    return fit(world, data, lambda b: [d["v"] for d in b[1]], accumulate=6 // world.world_size)


def test_a_list_of_detections_has_a_sample_in_each(same_at_every_world_size: Judge) -> None:
    """pytorch/ignite#508: the targets of a detector are a list, since each image has another number of them."""
    same_at_every_world_size(train_on_detections, right_over_stream())


def test_a_list_of_images_has_a_sample_in_each(same_at_every_world_size: Judge) -> None:
    """Lightning-AI/pytorch-lightning#10093: the first tensor's channels were taken for the batch's size."""
    same_at_every_world_size(train_on_images, right_over_stream())


def test_images_beside_targets_are_counted_by_both(same_at_every_world_size: Judge) -> None:
    """torchgeo/torchgeo#1928: a detector's images and targets, each in a list of their own."""
    same_at_every_world_size(train_on_images_and_targets, right_over_stream())


def mean_of_strings(world: World) -> float:
    loader = world.loader([str(value) for value in range(10)], global_batch_size=4, collate_fn=list)
    return mean_over(world, loader, lambda b: list(map(float, b)))


def mean_of_text_fields(world: World) -> float:
    samples = [{"text": str(value), "lang": "en"} for value in range(10)]
    loader = world.loader(samples, global_batch_size=4)
    return mean_over(world, loader, lambda b: list(map(float, b["text"])))


def test_a_list_of_texts_has_a_sample_in_each(same_at_every_world_size: Judge) -> None:
    """Lightning-AI/pytorch-lightning#12071: a batch of texts has no tensor to count by."""
    same_at_every_world_size(mean_of_strings, sum(VALUES) / 10)


def test_fields_of_texts_have_a_sample_in_each_row(same_at_every_world_size: Judge) -> None:
    """mosaicml/composer#2599: a mapping of lists."""
    same_at_every_world_size(mean_of_text_fields, sum(VALUES) / 10)


# Batches whose first dimension is not the samples'


def time_first(samples: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences as long as their value, beside each other, and one label each."""
    return pad_sequence([torch.ones(int(value) + 1, 2) for value in samples]), torch.tensor(samples)


def packed(samples: list[float]) -> PackedSequence:
    return pack_sequence([torch.full((int(value) + 1,), value) for value in samples], enforce_sorted=False)


def values_of_packed(batch: PackedSequence) -> list[float]:
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(batch)
    return [float(value) for value in padded[0]]


def train_on_time_first(world: World) -> float:
    loader = world.loader(Numbers(), global_batch_size=7, collate_fn=time_first)
    return fit(world, loader, lambda b: b[1].tolist())


def mean_on_time_first(world: World) -> float:
    loader = world.loader(Numbers(), global_batch_size=7, collate_fn=time_first)
    return mean_over(world, loader, lambda b: b[1].tolist())


def train_on_packed(world: World) -> float:
    return fit(world, world.loader(Numbers(), global_batch_size=7, collate_fn=packed), values_of_packed)


def test_sequences_with_time_first_are_counted_by_their_labels(same_at_every_world_size: Judge) -> None:
    """pytorch/ignite#96: the batch is not the first dimension of a sequence model's input."""
    same_at_every_world_size(train_on_time_first, fitted(in_groups(VALUES, 7)))


def test_a_mean_over_sequences_with_time_first_is_over_samples(same_at_every_world_size: Judge) -> None:
    same_at_every_world_size(mean_on_time_first, sum(VALUES) / 10)


def test_packed_sequences_are_counted_by_sequences(same_at_every_world_size: Judge) -> None:
    """Lightning-AI/pytorch-lightning#12071: the number found was that of the time steps."""
    same_at_every_world_size(train_on_packed, fitted(in_groups(VALUES, 7)))


def with_a_table(samples: list[float]) -> dict[str, torch.Tensor]:
    """A feature that belongs to no sample stands first."""
    return {"anchors": torch.zeros(9, 4), "x": torch.tensor(samples), "y": torch.tensor(samples)}


def train_beside_a_table(world: World) -> float:
    return fit(world, world.loader(Numbers(), global_batch_size=6, collate_fn=with_a_table), lambda b: b["x"].tolist())


def test_a_field_without_samples_is_overruled_by_those_with(same_at_every_world_size: Judge) -> None:
    """huggingface/transformers#30357: features that have no batch dimension."""
    same_at_every_world_size(train_beside_a_table, fitted(in_groups(VALUES, 6)))


# Batches that are objects


class Graphs:
    """Some graphs as a graph library joins them: all nodes in one tensor, and `len` is the number of its fields."""

    def __init__(self, values: list[float]) -> None:
        self.x = torch.cat([torch.full((int(value) + 1, 2), value) for value in values])
        self.values = values

    @property
    def batch_size(self) -> int:
        return len(self.values)

    def __len__(self) -> int:
        return 2


class Fields:
    """A batch class as in torch's notes on pinning memory: two attributes and nothing else."""

    def __init__(self, values: list[float]) -> None:
        self.name = "numbers"
        self.inputs = torch.tensor(values)
        self.targets = torch.tensor(values)


class Encoding(UserDict[str, Any]):
    """A tokenizer's batch."""


def encoding(values: list[float]) -> Encoding:
    return Encoding(ids=torch.tensor(values).long()[:, None].repeat(1, 5), labels=torch.tensor(values))


def train_on_graphs(world: World) -> float:
    data = dealt(world, stream_of(Graphs))
    return fit(world, data, operator.attrgetter("values"), accumulate=6 // world.world_size)


def train_on_fields(world: World) -> float:
    data = dealt(world, stream_of(Fields))
    return fit(world, data, lambda b: b.inputs.tolist(), accumulate=6 // world.world_size)


def train_on_encodings(world: World) -> float:
    data = dealt(world, stream_of(encoding))
    return fit(world, data, lambda b: b["labels"].tolist(), accumulate=6 // world.world_size)


def test_an_object_with_a_batch_size_is_believed(same_at_every_world_size: Judge) -> None:
    """pyg-team/pytorch_geometric#9829: the number of nodes was taken for that of graphs."""
    same_at_every_world_size(train_on_graphs, right_over_stream())


def test_an_object_with_attributes_is_counted_by_them(same_at_every_world_size: Judge) -> None:
    """Lightning-AI/pytorch-lightning#10541: a batch class of the user's own."""
    same_at_every_world_size(train_on_fields, right_over_stream())


def test_a_tokenizers_batch_is_counted_by_its_tensors(same_at_every_world_size: Judge) -> None:
    same_at_every_world_size(train_on_encodings, right_over_stream())


# Where nothing tells


class Opaque:
    """A batch that shows nothing."""

    __slots__ = ("values",)

    def __init__(self, values: list[float]) -> None:
        self.values = values


def train_on_opaque(world: World) -> float:
    data = dealt(world, stream_of(Opaque))
    return fit(world, data, operator.attrgetter("values"), accumulate=6 // world.world_size)


def mean_of_pairs_in_lists(world: World) -> float:
    pairs = [[torch.zeros(7, 5), torch.zeros(7, 5)] for _ in range(3)]
    return mean_over(world, pairs, lambda b: [1.0])


def train_on_opaque_counted(world: World) -> float:
    data = dealt(world, stream_of(Opaque))
    return fit(
        world,
        data,
        operator.attrgetter("values"),
        accumulate=6 // world.world_size,
        samples_in=lambda b: len(b.values),
    )


@pytest.mark.parametrize("function", [train_on_opaque, mean_of_pairs_in_lists])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_that_nothing_tells_about_is_an_error(function: Any, world_size: int) -> None:
    """mosaicml/composer#833: a list of two tensors may be two samples or a pair of fields."""
    with pytest.raises(RanksError) as raised:
        run_ranks(function, world_size)
    assert isinstance(raised.value.__cause__, DataError)
    assert "samples_in=" in str(raised.value.__cause__)


def test_samples_in_counts_what_nothing_else_tells_about(same_at_every_world_size: Judge) -> None:
    same_at_every_world_size(train_on_opaque_counted, right_over_stream())


# When batches are counted


def mean_of_consumed(world: World) -> float:
    """The step takes its batch apart before a metric asks how large it was."""
    loader = world.loader([str(value) for value in range(10)], global_batch_size=4, collate_fn=list)

    def step(engine: Engine, batch: list[str]) -> float:
        count, total = len(batch), 0.0
        while batch:
            total += float(batch.pop())
        return total / count

    engine = Engine(step)
    Metrics({"mean": Mean()}).attach(engine)
    return float(engine.run(loader, uneven="longest").metrics["mean"])


def test_a_batch_is_counted_before_the_step_takes_it_apart(same_at_every_world_size: Judge) -> None:
    """A generator of texts that are popped one by one, as in a loop over a queue."""
    same_at_every_world_size(mean_of_consumed, sum(VALUES) / 10)


def seen_samples(world: World) -> list[int]:
    """Samples of all ranks in each iteration, of batches that have none on some rank."""
    loader = world.loader(Numbers(), global_batch_size=6, collate_fn=leave_out_bad)
    engine, seen = Engine(lambda e, b: None, accumulate=1), []
    Metrics({"mean": Mean()}).attach(engine, lambda output: 0.0)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(engine.state.samples))
    engine.run(loader, uneven="longest")
    return seen


def test_the_samples_that_a_handler_sees_are_the_batches_own(same_at_every_world_size: Judge) -> None:
    same_at_every_world_size(seen_samples, [4, 3], join=lambda ranks: [sum(each) for each in zip(*ranks, strict=True)])
