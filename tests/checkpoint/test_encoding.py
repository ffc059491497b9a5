"""State survives being taken apart and put together, with its types; what would not survive is refused by name."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allstep.checkpoint.encoding import decode, encode
from allstep.errors import DamagedCheckpointError, UnsupportedStateError

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
keys = st.text() | st.integers() | st.booleans() | st.tuples(st.integers(), st.text())
nested = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner) | st.sets(st.integers()),
    max_leaves=20,
)


def there_and_back(value: Any) -> Any:
    encoded = encode(value, "x")
    return decode(json.loads(json.dumps(encoded.document)), lambda name: encoded.tensors[name].clone())


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(
            type(a) is type(b) and same(left[a], right[b]) for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@given(nested)
def test_plain_values_come_back_with_their_types(value: Any) -> None:
    assert same(there_and_back(value), value)


@pytest.mark.parametrize(
    "value",
    [
        np.float32(0.1),
        np.int64(-(2**63)),
        np.bool_(True),
        np.str_("a"),
        np.datetime64("2026-01-01"),
        Counter({30: 1, 60: 2}),
        OrderedDict([("b", 1), ("a", 2)]),
        torch.Size([2, 3]),
        torch.bfloat16,
        torch.device("cpu"),
        frozenset({1, "a"}),
        -0.0,
        {"$tensor": "a key that looks like ours"},
    ],
)
def test_values_of_the_field_come_back_with_their_types(value: Any) -> None:
    back = there_and_back(value)
    assert type(back) is type(value)
    # The order of a set's members is that in which they came.
    assert back == value if isinstance(value, set | frozenset) else repr(back) == repr(value)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_floats_that_json_has_not_come_back(special: float) -> None:
    assert repr(there_and_back([special])) == repr([special])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.zeros((0, 4)),
        np.array(["a", "bc"]),
        np.random.default_rng(0).random(5000),
        np.arange(9000, dtype=np.longdouble),
        np.array(3.5),
    ],
)
def test_arrays_come_back_with_dtype_and_shape(array: np.ndarray[Any, Any]) -> None:
    back = there_and_back({"a": array})["a"]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert (back == array).all()
    back.fill(back.flat[0] if back.size else 0)  # may be written to


def test_the_states_of_all_random_generators_come_back() -> None:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    back = there_and_back(state)
    assert back["python"] == state["python"]
    random.setstate(back["python"])
    np.random.set_state(back["numpy"])
    assert torch.equal(back["torch"], torch.get_rng_state())


def test_integer_keys_and_texts_that_look_like_them_stay_apart() -> None:
    state = {"state": {0: torch.ones(1), "0": torch.zeros(1), -1: torch.full((1,), 2.0)}}
    back = there_and_back(state)["state"]
    assert {key: tensor.item() for key, tensor in back.items()} == {0: 1.0, "0": 0.0, -1: 2.0}


@given(st.dictionaries(st.text("a/~0#-"), st.dictionaries(st.text("a/~0#-") | st.integers(-2, 2), st.just(0))))
def test_no_two_keys_share_a_name(value: dict[str, dict[Any, int]]) -> None:
    tensors = {key: {inner: torch.ones(1) for inner in entry} for key, entry in value.items()}
    assert len(encode(tensors, "x").tensors) == sum(map(len, value.values()))


def test_a_modules_state_keeps_the_versions_of_its_submodules() -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    assert there_and_back(state)._metadata == state._metadata  # type: ignore[attr-defined]


def test_tied_weights_are_kept_once() -> None:
    weight = torch.randn(3)
    encoded = encode({"a": weight, "b": weight.detach(), "c": weight[1:]}, "model")
    assert list(encoded.tensors) == ["model/a", "model/c"]


class Plain:
    pass


class MadeOfTwo(torch.Tensor):
    """A tensor of several, as quantized ones are; copied it would be a plain one."""

    def __new__(cls) -> MadeOfTwo:
        made: MadeOfTwo = torch.Tensor._make_wrapper_subclass(cls, (2,))  # type: ignore[attr-defined]
        made.scale, made.values = torch.ones(()), torch.ones(2)
        return made

    def __tensor_flatten__(self) -> Any:
        return ["scale", "values"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, meta: Any, size: Any, stride: Any) -> MadeOfTwo:
        return cls()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(function)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": {"fn": Plain()}}, r"part\['a'\]\['fn'\] is a .*test_encoding\.Plain"),
        ({"a": [1, print]}, r"part\['a'\]\['1'\] is a builtin_function_or_method"),
        ({"a": np.array([object()])}, r"part\['a'\] is a numpy\.ndarray.*object"),
        ({"a": torch.ones(2).to_sparse()}, r"part\['a'\] is a torch\.Tensor.*sparse"),
        ({"a": torch.empty(2, device="meta")}, r"part\['a'\].*meta"),
        ({"a": MadeOfTwo()}, r"part\['a'\] is a .*MadeOfTwo.*made of other tensors"),
        ({"a": np.ma.array([1, 2], mask=[0, 1])}, r"part\['a'\] is a numpy.*MaskedArray.*plain numpy arrays"),
        ({Plain(): 1}, r"Plain"),
        ({"a": OSError()}, r"part\['a'\] is a OSError"),
    ],
)
def test_what_cannot_be_saved_is_refused_with_its_key_and_type(value: Any, said: str) -> None:
    with pytest.raises(UnsupportedStateError, match=said):
        encode(value, "part")


def test_a_value_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(UnsupportedStateError, match="part is nested more than"):
        encode(value, "part")


@pytest.mark.parametrize(
    "document",
    [
        {"$call": "os.system"},
        {"$tensor": "not there"},
        {"$tensor": "x", "more": 1},
        {"$array": {"dtype": "O", "shape": [1], "data": "AAAAAAAAAAA="}},
        {"$array": {"dtype": "f8", "shape": [10**12], "data": ""}},
        {"$scalar": {"dtype": "V8", "shape": [], "data": "AAAAAAAAAAA="}},
        {"$dict": [[["unhashable"], 1]]},
        {"$dtype": "no_such"},
        {"$float": "__import__"},
        {"$bytes": 5},
        {"$tuple": 5},
    ],
)
def test_a_document_that_nobody_wrote_is_refused(document: Any) -> None:
    with pytest.raises(DamagedCheckpointError):
        decode(document, {"x": torch.ones(1)}.__getitem__)
