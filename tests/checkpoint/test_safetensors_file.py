"""Headers that lie are refused, and the reader finds what was laid out."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch

from allstep.checkpoint.safetensors_file import read_header
from allstep.checkpoint.snapshot import SnapshotBuffer
from allstep.errors import DamagedCheckpointError


def test_our_own_reader_finds_what_was_copied() -> None:
    copied = SnapshotBuffer().copy([("a", torch.arange(5)), ("b", torch.ones(3, dtype=torch.bool))])
    start, slots = read_header(io.BytesIO(copied.header), copied.size)
    assert start == len(copied.header)
    assert {key: (slot.dtype, slot.shape) for key, slot in slots.items()} == {
        "a": (torch.int64, (5,)),
        "b": (torch.bool, (3,)),
    }


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
