"""Files of tensors are safetensors as the library reads them, and headers that lie are refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from allstep.checkpoint.safetensors_file import read_header
from allstep.checkpoint.snapshot import Stager
from allstep.errors import DamagedCheckpointError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    torch.bool,
]


def test_the_library_reads_what_was_staged_for_all_dtypes(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "strided": torch.randn(6, 4).t()[1:]}
    staged = Stager().stage(list(tensors.items()))
    (tmp_path / "t.safetensors").write_bytes(staged.header + bytes(staged.data))
    read = safetensors.load_file(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype is tensor.dtype
        assert read[name].shape == tensor.shape
        assert read[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_our_own_reader_finds_what_was_staged() -> None:
    staged = Stager().stage([("a", torch.arange(5)), ("b", torch.ones(3, dtype=torch.bool))])
    start, slots = read_header(io.BytesIO(staged.header), staged.size)
    assert start == len(staged.header)
    assert {key: (slot.dtype, slot.shape) for key, slot in slots.items()} == {
        "a": (torch.int64, (5,)),
        "b": (torch.bool, (3,)),
    }


def test_what_was_staged_does_not_change_with_the_tensors() -> None:
    tensor = torch.zeros(4)
    staged = Stager().stage([("t", tensor)])
    tensor.fill_(1)
    assert bytes(staged.data) == bytes(16)


def test_a_second_save_uses_the_same_memory() -> None:
    stager = Stager()
    first = stager.stage([("t", torch.zeros(1000))])
    second = stager.stage([("t", torch.ones(1000))])
    smaller = stager.stage([("u", torch.ones(10))])
    places = [torch.frombuffer(each.data, dtype=torch.uint8).data_ptr() for each in (first, second, smaller)]
    assert len(set(places)) == 1


def described(**entry: Any) -> bytes:
    text = json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(8),
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"nope",
        described(dtype="PICKLE"),
        described(shape=[10**12]),
        described(shape=[-2]),
        described(shape="2"),
        described(shape=[2.0]),
        described(data_offsets=[8, 16]),
        described(data_offsets=[0, 4]),
        described(data_offsets=[-8, 0]),
        described(data_offsets=[0]),
    ],
)
def test_a_header_that_lies_is_refused(content: bytes) -> None:
    with pytest.raises(DamagedCheckpointError, match="not a safetensors file"):
        read_header(io.BytesIO(content), len(content))
