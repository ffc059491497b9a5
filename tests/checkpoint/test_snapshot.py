"""What is copied for a save is safetensors as the library reads it, in memory that is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from allstep.checkpoint.snapshot import SnapshotBuffer

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    torch.bool,
]


def test_the_library_reads_what_was_copied_for_all_dtypes(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "strided": torch.randn(6, 4).t()[1:]}
    copied = SnapshotBuffer().copy(list(tensors.items()))
    (tmp_path / "t.safetensors").write_bytes(copied.header + bytes(copied.data))
    read = safetensors.load_file(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype is tensor.dtype
        assert read[name].shape == tensor.shape
        assert read[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_what_was_copied_does_not_change_with_the_tensors() -> None:
    tensor = torch.zeros(4)
    copied = SnapshotBuffer().copy([("t", tensor)])
    tensor.fill_(1)
    assert bytes(copied.data) == bytes(16)


def test_a_second_save_uses_the_same_memory() -> None:
    buffer = SnapshotBuffer()
    first = buffer.copy([("t", torch.zeros(1000))])
    second = buffer.copy([("t", torch.ones(1000))])
    smaller = buffer.copy([("u", torch.ones(10))])
    places = [torch.frombuffer(each.data, dtype=torch.uint8).data_ptr() for each in (first, second, smaller)]
    assert len(set(places)) == 1
