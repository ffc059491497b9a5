"""How many samples a batch has, by what it shows and by what its sampler dealt."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import default_collate

from allstep.engine.sample_count import count_samples
from allstep.errors import DataError

Pair = namedtuple("Pair", "x y")
zeros = torch.zeros
image = zeros(3, 8, 8)


@dataclass
class Fields:
    x: torch.Tensor
    y: torch.Tensor


class Attributes:
    def __init__(self) -> None:
        self.name, self.source = "a", zeros(4, 2)


class Sized:
    def __init__(self, *, batch_size: Any = None, length: int = 5) -> None:
        if batch_size is not None:
            self.batch_size = batch_size
        self.length = length

    def __len__(self) -> int:
        return self.length


class Opaque:
    __slots__ = ()


def boxes(*counts: int) -> list[dict[str, Any]]:
    return [{"boxes": zeros(count, 4), "label": torch.zeros(count)} for count in counts]


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (zeros(4, 2), 4),
        (np.zeros((4, 2)), 4),
        ((zeros(4, 20), zeros(4)), 4),
        ((zeros(4, 20), zeros(4, 20)), 4),
        ((zeros(3), zeros(5)), 3),
        (Pair(zeros(4, 2), zeros(4, 2)), 4),
        (Fields(zeros(4, 2), zeros(4)), 4),
        ({"id": "a", "x": zeros(2, 7)}, 2),
        ({"classes": ["cat", "dog"], "x": zeros(5, 7)}, 5),
        ({"boxes": zeros(0, 4), "v": zeros(3)}, 3),
        ([["text"], {"deep": (torch.tensor(1.0), zeros(6))}], 6),
        ((zeros(4, 20), [zeros(4), zeros(4)]), 4),
        (((zeros(5, 3, 8, 8), zeros(5).long()), (zeros(15, 3, 8, 8), zeros(15).long())), 5),
    ],
)
def test_fields_are_counted_by_the_rows_of_the_first_tensor(batch: Any, samples: int) -> None:
    assert count_samples(batch) == samples


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (["a", "b", "c"], 3),
        ([1.0, 2.0], 2),
        ([torch.tensor(1.0), torch.tensor(2.0)], 2),
        ([], 0),
        (boxes(1, 0, 2), 3),
        (boxes(0), 1),
        ([image, image], 2),
        ([image], 1),
        ([image, zeros(3, 9, 9)], 2),
        ([zeros(7).long(), zeros(5).long()], 2),
        ([[1, 2], [1, 2, 3], [4]], 3),
        ([[1, 2, 4], [1, 2, 3]], 2),
        ([("a", 1), ("b", 2), ("c", 3)], 3),
        ([(zeros(20), 1), (zeros(20), 2), (zeros(20), 2)], 3),
        ([(image, zeros(8, 8).long())] * 4, 4),
        ([(image, zeros(1, 8, 8))] * 4, 4),
        ([Opaque(), Opaque()], 2),
    ],
)
def test_a_list_is_counted_by_its_length(batch: Any, samples: int) -> None:
    assert count_samples(batch) == samples


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (([image] * 2, boxes(1, 2)), 2),
        ((tuple([image] * 5), tuple(boxes(5, 5, 5, 5, 5))), 5),
        ([tuple([image] * 5), tuple(boxes(5, 5, 5, 5, 5))], 5),
        ((("a", "b", "c"), (1, 2, 3)), 3),
        ({"image": [image] * 6, "id": [1] * 6}, 6),
        ({"x": [zeros(7, 2), zeros(7, 2)], "y": [zeros(9), zeros(9)]}, 2),
        (([zeros(7, 2), zeros(7, 2)], zeros(2)), 2),
    ],
)
def test_columns_of_samples_are_counted_together(batch: Any, samples: int) -> None:
    assert count_samples(batch) == samples


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (pack_sequence([zeros(3), zeros(2)]), 2),
        (torch.nested.nested_tensor([zeros(2, 3), zeros(4, 3)], layout=torch.jagged), 2),
        (Sized(batch_size=7), 7),
        (Sized(batch_size=torch.Size([7, 2])), 7),
        (Sized(), 5),
        (Attributes(), 4),
    ],
)
def test_an_object_is_counted_by_what_it_says(batch: Any, samples: int) -> None:
    assert count_samples(batch) == samples


@pytest.mark.parametrize("batch", [3, "text", None, {"a": "b"}, torch.tensor(1.0), (1.0, "a")])
def test_numbers_and_texts_are_one_sample(batch: Any) -> None:
    assert count_samples(batch) == 1


@pytest.mark.parametrize(
    ("batch", "dealt", "samples"),
    [
        ([zeros(4, 20), zeros(4, 20)], 4, 4),
        ([zeros(7), zeros(7)], 2, 2),
        ((image, image), 2, 2),
        ([{"x": zeros(4, 20)}, {"x": zeros(4, 20)}], 4, 4),
        ([(zeros(5, 8), zeros(5).long())] * 2, 5, 5),
        ((zeros(7, 4), zeros(4)), 4, 4),
        ((zeros(7, 4), zeros(9, 4)), 4, 4),
        ({"edges": zeros(2, 9), "x": zeros(4, 3), "y": zeros(4)}, 4, 4),
        (Opaque(), 4, 4),
        (0.5, 4, 4),
    ],
)
def test_what_was_dealt_decides_between_readings(batch: Any, dealt: int, samples: int) -> None:
    assert count_samples(batch, lambda: dealt) == samples


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (zeros(3), 3),
        ((zeros(3, 20), zeros(3)), 3),
        ((zeros(3, 4), zeros(3)), 3),
        (["a", "b", "c"], 3),
        ([image, image, image], 3),
        ([{"boxes": zeros(4, 4), "v": 1.0}] * 3, 3),
        ({"x": zeros(8, 2), "y": zeros(8)}, 8),
    ],
)
def test_a_batch_with_other_than_was_dealt_is_counted_as_it_is(batch: Any, samples: int) -> None:
    assert count_samples(batch, lambda: 4) == samples


@pytest.mark.parametrize(
    ("samples", "count"),
    [
        ([(zeros(20), zeros(20))] * 4, 4),
        ([(image, image)] * 2, 2),
        ([("a", "b")] * 3, 3),
        (["a"] * 3, 3),
        ([{"text": "a", "x": 1.0}] * 3, 3),
        ([[zeros(5), zeros(5)]] * 3, 3),
    ],
)
def test_what_torch_collated_is_counted_by_its_rows(samples: list[Any], count: int) -> None:
    assert count_samples(default_collate(samples), default_collated=True) == count


@pytest.mark.parametrize(
    ("batch", "dealt"),
    [
        (Opaque(), None),
        ([zeros(4, 20), zeros(4, 20)], None),
        ([zeros(7), zeros(7)], 3),
        (zeros(7, 4), 4),
        ([zeros(7, 4), zeros(9, 4)], 4),
    ],
)
def test_a_batch_that_nothing_tells_about_is_refused(batch: Any, dealt: int | None) -> None:
    with pytest.raises(DataError, match="samples_in="):
        count_samples(batch, lambda: dealt)


def test_the_sampler_is_not_asked_about_what_it_cannot_change() -> None:
    def never() -> int:
        raise AssertionError("asked")

    assert count_samples(["a", "b"], never) == 2
    assert count_samples([zeros(4), zeros(4)], never, default_collated=True) == 4
