"""Moving nested structures. The `meta` device stands in for an accelerator: tensors really change device."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from allstep.world import to_device

META = torch.device("meta")
CPU = torch.device("cpu")
Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    label: str
    twice: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "twice", self.x * 2)


@dataclasses.dataclass(slots=True)
class Slotted:
    x: torch.Tensor


class Tagged(list[Any]):
    tag = "none"


class Movable:
    def __init__(self, where: str = "cpu") -> None:
        self.where = where

    def to(self, device: torch.device) -> Movable:
        return Movable(device.type)


def tensor() -> torch.Tensor:
    return torch.zeros(2)


def test_a_tensor_moves():
    assert to_device(tensor(), META).device == META


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict, MappingProxyType])
def test_mappings_keep_their_type_and_order(kind):
    moved = to_device(kind({"b": tensor(), "a": 1}), META)
    assert type(moved) is kind
    assert list(moved) == ["b", "a"]
    assert (moved["b"].device, moved["a"]) == (META, 1)


def test_a_defaultdict_keeps_its_factory():
    moved = to_device(defaultdict(list, x=tensor()), META)
    assert moved["x"].device == META
    assert moved["new"] == []


@pytest.mark.parametrize("value", [[tensor(), "s"], (tensor(), "s"), Pair(tensor(), "s"), Tagged([tensor(), "s"])])
def test_sequences_keep_their_type(value):
    moved = to_device(value, META)
    assert type(moved) is type(value)
    assert (moved[0].device, moved[1]) == (META, "s")


def test_a_list_subclass_keeps_its_attributes():
    value = Tagged([tensor()])
    value.tag = "kept"
    assert to_device(value, META).tag == "kept"


def test_a_frozen_dataclass_moves_with_fields_it_computed_itself():
    value = Frozen(tensor(), "cat")
    moved = to_device(value, META)
    assert (moved.x.device, moved.twice.device, moved.label) == (META, META, "cat")
    assert value.x.device == CPU


def test_a_dataclass_with_slots_moves():
    assert to_device(Slotted(tensor()), META).x.device == META


def test_an_object_with_a_to_method_moves_itself():
    assert to_device([Movable()], META)[0].where == "meta"


def test_a_packed_sequence_stays_one():
    moved = to_device(pack_sequence([torch.ones(2, 1), torch.ones(1, 1)]), META)
    assert isinstance(moved, PackedSequence)
    assert moved.data.device == META


def test_structures_nest():
    moved = to_device({"a": [Pair(tensor(), {"b": (tensor(),)})]}, META)
    assert (moved["a"][0].x.device, moved["a"][0].y["b"][0].device) == (META, META)


@pytest.mark.parametrize("leaf", [None, 1, 2.5, "text", b"bytes", {1, 2}, object(), Movable, Frozen])
def test_other_leaves_are_the_same_objects(leaf):
    assert to_device([leaf], META)[0] is leaf


def test_a_tensor_that_is_there_already_is_not_copied():
    x = tensor()
    assert to_device({"x": [x]}, CPU)["x"][0] is x


def test_what_was_given_is_not_changed():
    value = {"x": [tensor()], "y": OrderedDict(z=tensor())}
    to_device(value, META)
    assert (value["x"][0].device, value["y"]["z"].device) == (CPU, CPU)
