"""Kind 1, collation: batches that hold fewer samples than were dealt for them, or more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from allstep import Engine, Events, World
from allstep.errors import DataError, RanksError
from allstep.testing import run_ranks
from tests.situations.fitting import VALUES, Numbers, fit, fitted, leave_out_bad, mean_over
from tests.situations.judge import Judge


def without_odd_tens(samples: list[float]) -> Any:
    """Leaves out the samples that could not be read: 1, 2 and 7."""
    return default_collate([value for value in samples if value not in (1.0, 2.0, 7.0)] or [-1.0])


def train_without_bad_samples(world: World) -> float:
    loader = world.loader(Numbers(), global_batch_size=5, collate_fn=without_odd_tens)
    return fit(world, loader, list, samples_in=lambda b: int((b >= 0).sum()))


def train_with_fewer_samples(world: World) -> float:
    loader = world.loader(Numbers(), global_batch_size=5, collate_fn=leave_out_bad)
    return fit(world, loader, lambda b: list(b) or [0.0])


def mean_with_fewer_samples(world: World) -> float:
    loader = world.loader(Numbers(), global_batch_size=6, collate_fn=leave_out_bad)
    return mean_over(world, loader, lambda b: b.tolist() or [0.0])


def twice_each(samples: list[float]) -> Any:
    """Two crops of the even ones, one of the others."""
    return torch.tensor([value for value in samples for _ in range(2 if value % 2 == 0 else 1)])


def train_with_more_samples(world: World) -> float:
    return fit(world, world.loader(Numbers(), global_batch_size=5, collate_fn=twice_each), list)


def test_a_sample_that_collation_leaves_out_weighs_nothing(same_at_every_world_size: Judge) -> None:
    """pytorch/pytorch#57429: samples that cannot be read are filtered in the collate function."""
    right = fitted([[0.0, 3.0, 4.0], [5.0, 6.0, 8.0, 9.0]])
    same_at_every_world_size(train_with_fewer_samples, right)


def test_a_placeholder_batch_weighs_what_samples_in_says(same_at_every_world_size: Judge) -> None:
    """dessa-oss/DeepFake-Detection#5: a batch of 32 with 28 faces, or none at all on one rank."""
    right = fitted([[0.0, 3.0, 4.0], [5.0, 6.0, 8.0, 9.0]])
    same_at_every_world_size(train_without_bad_samples, right)


def test_a_mean_is_over_the_samples_that_collation_left(same_at_every_world_size: Judge) -> None:
    right = sum(value for value in VALUES if value not in (1.0, 2.0, 7.0)) / 7
    same_at_every_world_size(mean_with_fewer_samples, right)


def test_a_sample_that_collation_doubles_weighs_twice(same_at_every_world_size: Judge) -> None:
    """Several crops of an image are rows of their own, as those of torchvision's FiveCrop."""
    right = fitted([[0.0, 0, 1, 2, 2, 3, 4, 4], [5.0, 6, 6, 7, 8, 8, 9]])
    same_at_every_world_size(train_with_more_samples, right)


def train_with_workers(world: World) -> float:
    options = {"num_workers": 2, "persistent_workers": False}
    loader = world.loader(Numbers(), global_batch_size=5, collate_fn=leave_out_bad, **options)
    return fit(world, loader, lambda b: list(b) or [0.0], epochs=2)


def train_in_micro_batches(world: World) -> float:
    loader = world.loader(Numbers(), global_batch_size=6, max_batch_per_rank=1, collate_fn=leave_out_bad)
    return fit(world, loader, lambda b: list(b) or [0.0])


def train_from_a_saved_place(world: World) -> list[float]:
    """One engine stops inside the epoch, with batches read ahead; another goes on from its state."""
    seen: list[float] = []

    def engine_of() -> tuple[Engine, Any]:
        loader = world.loader(Numbers(), global_batch_size=3, collate_fn=leave_out_bad)
        return Engine(lambda e, b: seen.extend(b.tolist() if e.state.active else []), name="trainer"), loader

    first, loader = engine_of()
    first.add_event_handler(Events.ITERATION_COMPLETED(once=2), first.terminate)
    first.run(loader, max_epochs=1, uneven="longest", window=1)
    state = first.state_dict()
    second, loader = engine_of()
    second.load_state_dict(state)
    second.run(loader, uneven="longest")
    return seen


def of_all(ranks: Sequence[list[float]]) -> list[float]:
    return sorted(value for each in ranks for value in each)


def test_batches_that_workers_collate_are_counted_as_they_are(same_at_every_world_size: Judge) -> None:
    right = fitted([[0.0, 3.0, 4.0], [5.0, 6.0, 8.0, 9.0]] * 2)
    same_at_every_world_size(train_with_workers, right)


def test_micro_batches_without_samples_left_weigh_nothing(same_at_every_world_size: Judge) -> None:
    """Of a global batch taken one sample at a time, some micro-batches are empty after collation."""
    same_at_every_world_size(train_in_micro_batches, fitted([[0.0, 3.0, 4.0, 5.0], [6.0, 8.0, 9.0]]))


def test_a_saved_place_does_not_count_what_was_read_ahead(same_at_every_world_size: Judge) -> None:
    right = [value for value in VALUES if value not in (1.0, 2.0, 7.0)]
    same_at_every_world_size(train_from_a_saved_place, right, join=of_all)


class Filtering(Numbers):
    """A dataset that fetches many at once and leaves out what it cannot read."""

    def __getitems__(self, indices: list[int]) -> list[float]:
        return [VALUES[index] for index in indices if index != 7]


def train_on_filtering(world: World) -> float:
    return fit(world, world.loader(Filtering(), global_batch_size=5, sample_seeding="off"), list)


def train_on_filtering_counted(world: World) -> float:
    loader = world.loader(Filtering(), global_batch_size=5, sample_seeding="off")
    return fit(world, loader, list, samples_in=len)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_dataset_that_fetches_fewer_than_asked_is_an_error(world_size: int) -> None:
    """huggingface/datasets gives a batch's samples at once; what such a dataset leaves out nobody has counted."""
    with pytest.raises(RanksError) as raised:
        run_ranks(train_on_filtering, world_size)
    assert isinstance(raised.value.__cause__, DataError)
    message = str(raised.value.__cause__)
    assert "in batch 1 and gave" in message
    assert "samples_in=" in message


def test_a_dataset_that_fetches_fewer_is_counted_by_samples_in(same_at_every_world_size: Judge) -> None:
    right = fitted([VALUES[:5], [5.0, 6.0, 8.0, 9.0]])
    same_at_every_world_size(train_on_filtering_counted, right)
