"""Kind 4: the step owns the batch that it is given, and may change or empty it, also where it runs a filler.

Rank 0 has more batches than the others throughout, so that these run fillers, several in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from allstep import Engine, World
from tests.situations.fitting import RATE, fit, fitted
from tests.situations.judge import Judge

VALUES = [float(value) for value in range(9)]


def uneven(world: World, make: Callable[[list[float]], Any]) -> list[Any]:
    """Batches of one sample, of which rank 0 has the last four; each iteration is one optimizer step."""
    together = [[value] for value in VALUES[:5]]
    if world.rank > 0:
        return [make([2.0])]
    return [make(values) for values in together]


def right(world_size: int) -> float:
    """The first step takes a sample of value 2 of each further rank."""
    return fitted([[VALUES[0], *[2.0] * (world_size - 1)], *[[value] for value in VALUES[1:5]]])


def judged(same_at_every_world_size: Judge, function: Callable[[World], Any]) -> None:
    for world_size in (1, 2, 3):
        same_at_every_world_size(function, right(world_size), world_sizes=[world_size])


# What a step takes out of its batch


def labelled(values: list[float]) -> dict[str, Any]:
    return {"ids": torch.tensor(values).long(), "labels": torch.tensor(values)}


def pop_labels(batch: dict[str, Any]) -> list[float]:
    return batch.pop("labels").tolist()


def train_popping_labels(world: World) -> float:
    return fit(world, uneven(world, labelled), pop_labels)


def train_popping_labels_of_one_rank(world: World) -> float:
    """The other ranks never have a batch, and take part with one of rank 0's."""
    data = [labelled([value]) for value in VALUES[:5]] if world.rank == 0 else []
    return fit(world, data, pop_labels)


def empty_list(batch: list[Any]) -> list[float]:
    assert batch, "there is nothing left of this batch"
    return [batch.pop()["v"] for _ in range(len(batch))]


def train_emptying_lists(world: World) -> float:
    return fit(world, uneven(world, lambda values: [{"v": value} for value in values]), empty_list)


def train_emptying_nested(world: World) -> float:
    def nested(values: list[float]) -> dict[str, Any]:
        return {"inputs": {"x": torch.tensor(values)}, "meta": [torch.tensor(values)]}

    def take(batch: dict[str, Any]) -> list[float]:
        batch["meta"].clear()
        return batch["inputs"].pop("x").tolist()

    return fit(world, uneven(world, nested), take)


def test_a_step_may_pop_the_labels(same_at_every_world_size: Judge) -> None:
    """Babelscape/rebel#19: a step and what comes after it both popped the labels."""
    judged(same_at_every_world_size, train_popping_labels)


def test_a_rank_without_any_batch_may_pop_the_labels(same_at_every_world_size: Judge) -> None:
    """facebookresearch/fairseq#1726: a rank that has no batch takes part with a dummy, which has to be there."""
    same_at_every_world_size(train_popping_labels_of_one_rank, fitted([[value] for value in VALUES[:5]]))


def test_a_step_may_empty_a_list_of_samples(same_at_every_world_size: Judge) -> None:
    judged(same_at_every_world_size, train_emptying_lists)


def test_a_step_may_empty_what_is_inside_of_its_batch(same_at_every_world_size: Judge) -> None:
    judged(same_at_every_world_size, train_emptying_nested)


# What a step writes into its batch


def train_shifting_ids(world: World) -> float:
    """Ids are counted from 1 in the data and from 0 in the step, which takes one off in place."""
    embedding = nn.Embedding.from_pretrained(torch.tensor(VALUES)[:, None])

    def shift(batch: torch.Tensor) -> list[float]:
        batch -= 1
        return embedding(batch)[:, 0].tolist()

    return fit(world, uneven(world, lambda values: torch.tensor(values).long() + 1), shift)


def train_shifting_arrays(world: World) -> float:
    def shift(batch: np.ndarray[Any, Any]) -> list[float]:
        batch -= 1
        assert (batch >= 0).all()
        return batch.tolist()

    return fit(world, uneven(world, lambda values: np.array(values) + 1), shift)


def train_freeing_memory(world: World) -> float:
    """A step that gives its batch's memory back as soon as it has computed with it."""

    def free(batch: torch.Tensor) -> list[float]:
        values = batch.tolist()
        batch.untyped_storage().resize_(0)
        return values

    return fit(world, uneven(world, torch.tensor), free)


def test_a_step_may_write_into_the_tensors_of_its_batch(same_at_every_world_size: Judge) -> None:
    """Ids that are shifted again in each filler leave the table of an embedding."""
    judged(same_at_every_world_size, train_shifting_ids)


def test_a_step_may_write_into_the_arrays_of_its_batch(same_at_every_world_size: Judge) -> None:
    judged(same_at_every_world_size, train_shifting_arrays)


def test_a_step_may_free_the_memory_of_its_batch(same_at_every_world_size: Judge) -> None:
    judged(same_at_every_world_size, train_freeing_memory)


# Batches that are objects


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor | None


class Fields:
    """A batch class with attributes."""

    def __init__(self, values: list[float]) -> None:
        self.x: torch.Tensor | None = torch.tensor(values)


def train_clearing_fields(world: World) -> float:
    def clear(batch: Pair) -> list[float]:
        assert batch.y is not None
        values, batch.y = batch.y.tolist(), None
        return values

    return fit(world, uneven(world, lambda values: Pair(torch.tensor(values), torch.tensor(values))), clear)


def train_clearing_attributes(world: World) -> float:
    def clear(batch: Fields) -> list[float]:
        assert batch.x is not None
        values = batch.x.tolist()
        del batch.x
        return values

    return fit(world, uneven(world, Fields), clear)


def test_a_step_may_clear_the_fields_of_a_dataclass(same_at_every_world_size: Judge) -> None:
    judged(same_at_every_world_size, train_clearing_fields)


def test_a_step_may_delete_the_attributes_of_a_batch(same_at_every_world_size: Judge) -> None:
    judged(same_at_every_world_size, train_clearing_attributes)


# A batch that is given again


def train_over_a_failure(world: World, accumulate: int) -> float:
    """The second iteration fails once. Its batch, and that of the first if both are one group, come again."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    model = world.wrap(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    failed = False

    def step(engine: Engine, batch: dict[str, Any]) -> None:
        nonlocal failed
        labels = batch.pop("labels")
        if engine.state.iteration == 2 and not failed:
            failed = True
            raise ConnectionError("once")
        loss = ((model(torch.ones(len(labels), 1))[:, 0] - labels) ** 2).mean() / 2
        (loss * engine.state.weight).backward()
        if engine.state.group_end:
            optimizer.step()
            optimizer.zero_grad()

    data = iter([labelled([value]) for value in VALUES[:4]])
    engine = Engine(step, accumulate=accumulate)
    try:
        engine.run(data, max_iters=4)
    except ConnectionError:
        optimizer.zero_grad()
    engine.run(data, max_iters=4)
    return float(net.weight.detach())


def test_a_failed_iteration_is_done_again_with_its_batch_as_it_was(same_at_every_world_size: Judge) -> None:
    """A step fails for a moment, over an iterator that cannot be read again."""
    same_at_every_world_size(train_over_a_failure, fitted([[value] for value in VALUES[:4]]), 1)


def test_a_group_that_is_begun_again_has_its_batches_as_they_were(same_at_every_world_size: Judge) -> None:
    same_at_every_world_size(train_over_a_failure, fitted([VALUES[:2], VALUES[2:4]]), 2)
