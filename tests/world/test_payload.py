"""Values on their way between ranks arrive bit for bit."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allstep.world.payload import HEADER_LENGTH, PayloadKind, decode, encode, encode_object, from_header, refusal

CPU = torch.device("cpu")


def travelled(payload):
    header = payload.header()
    assert len(header) == HEADER_LENGTH
    padded = torch.cat([payload.data, torch.full((5,), 255, dtype=torch.uint8)])
    return from_header(header, padded)


@given(st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1)))
def test_bools_and_ints_arrive_as_they_were(value):
    arrived = decode(travelled(encode(value)), CPU)
    assert arrived == value
    assert type(arrived) is type(value)


@given(st.floats())
def test_floats_arrive_with_all_their_bits(value):
    assert struct.pack("<d", decode(travelled(encode(value)), CPU)) == struct.pack("<d", value)


def test_numpy_scalars_travel_as_numbers():
    assert decode(encode(np.int32(7)), CPU) == 7
    assert decode(encode(np.float64(math.pi)), CPU) == math.pi


DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e5m2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (1, 1, 2, 1, 2)], ids=str)
def test_tensors_of_any_dtype_and_shape_arrive(dtype, shape):
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape).to(dtype)
    arrived = decode(travelled(encode(tensor)), CPU)
    assert (arrived.dtype, arrived.shape) == (dtype, tensor.shape)
    assert arrived.tolist() == tensor.tolist()


def test_a_strided_tensor_arrives_as_it_reads():
    tensor = torch.arange(24).reshape(4, 6)[::2, ::3].T
    assert torch.equal(decode(travelled(encode(tensor)), CPU), tensor)


def test_a_conjugated_view_arrives_as_it_reads():
    tensor = torch.tensor([1 + 2j]).conj()
    assert torch.equal(decode(travelled(encode(tensor)), CPU), torch.tensor([1 - 2j]))


def test_a_tensor_shares_no_memory_with_what_was_given():
    tensor = torch.zeros(2)
    decode(encode(tensor), CPU).add_(1)
    assert tensor.tolist() == [0, 0]


def test_objects_arrive():
    value = {"a": [1, None, "x"], "b": {2.5}}
    assert decode(travelled(encode_object(value)), CPU) == value


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (encode(2**63), "9223372036854775808, which does not fit into 64 bits"),
        (encode("text"), "a str; use gather_objects"),
        (encode(torch.eye(2).to_sparse()), "layout torch.sparse_coo"),
        (encode(torch.zeros([1] * 17)), "17 dimensions"),
        (encode_object(lambda: None), "a function that cannot be pickled"),
    ],
)
def test_what_cannot_travel_says_why(payload, reason):
    arrived = travelled(payload)
    assert arrived.kind is PayloadKind.REFUSED
    assert reason in refusal(arrived)
