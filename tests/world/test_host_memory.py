"""Memory that copies from a device run into: registered, bounded, given back, and plain where that fails.

Stand-in: `torch.cuda.cudart` is a list of what was asked for; no memory is pinned.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from allstep import cuda
from allstep.checkpoint import snapshot
from allstep.checkpoint.snapshot import SnapshotBuffer
from allstep.cuda import HostMemory, copied_ahead

CUDA_OUT_OF_MEMORY = 2


class Driver:
    """Stands for CUDA's runtime: `registered` has the sizes that are registered now, by address."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.registered: dict[int, int] = {}
        self.status = 0
        self.cleared = 0
        runtime = SimpleNamespace(cudaHostRegister=self.register, cudaHostUnregister=self.registered.pop)
        patch.setattr(torch.cuda, "cudart", lambda: runtime)
        patch.setattr(cuda, "_said", set())
        patch.setattr(cuda, "_clear_error", self.clear)

    def clear(self) -> None:
        self.cleared += 1

    def register(self, address: int, size: int, flags: int) -> int:
        if self.status == 0:
            self.registered[address] = size
        return self.status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_what_is_pinned_has_its_own_size_and_is_given_back(driver):
    memory = HostMemory(1_000_001, pinned=True)
    assert memory.pinned
    assert list(driver.registered.values()) == [1_000_001]
    assert memory.bytes.numel() == 1_000_001
    del memory
    assert driver.registered == {}


def test_memory_that_cannot_be_pinned_is_plain_with_one_line(driver, caplog):
    driver.status = CUDA_OUT_OF_MEMORY
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            memory = HostMemory(4096, pinned=True)
            assert not memory.pinned
            memory.bytes.fill_(1)
    assert driver.cleared == 3  # else the next kernel would be blamed
    (line,) = caplog.messages
    assert "cannot be pinned: CUDA says 2; copies from the device make the host wait" in line


def test_no_more_is_pinned_than_the_machine_can_spare(driver, caplog, monkeypatch):
    assert not HostMemory(4096, pinned=True, most=4095).pinned
    assert "are not pinned, since more than 4,095 would be" in caplog.text
    whole = cuda.pinnable()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cuda.pinnable() == whole // 8
    assert driver.registered == {}


def test_without_cuda_memory_is_plain(caplog):
    assert not HostMemory(4096).pinned
    assert caplog.text == ""


def test_the_copy_of_a_save_is_as_large_as_its_file_and_shrinks_with_it(monkeypatch):
    monkeypatch.setattr(snapshot, "_KEPT", 0)
    buffer = SnapshotBuffer()
    sizes = []
    for elements in (1_000_000, 900_000, 1_000):
        file = buffer.copy([("weight", torch.ones(elements))])
        sizes.append((file.data.nbytes, buffer.reserved))
    assert sizes == [(4_000_000, 4_000_000), (3_600_000, 4_000_000), (4_000, 4_000)]


class OnDevice:
    """In place of a tensor on a CUDA device, for which torch can pin no more memory."""

    nbytes = 12

    def __init__(self, *, lost: bool = False) -> None:
        self.lost = lost

    def to(self, device: str, *, non_blocking: bool = False) -> str:
        if non_blocking or self.lost:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
        return device


def test_an_output_is_copied_with_one_line_where_torch_can_pin_no_memory(driver, caplog):
    assert [copied_ahead(OnDevice()) for _ in range(3)] == ["cpu"] * 3
    assert caplog.messages == [
        "12 bytes on the host cannot be pinned: CUDA error: out of memory; copies from the device make the host wait"
    ]
    with pytest.raises(RuntimeError, match="out of memory"):
        copied_ahead(OnDevice(lost=True))
