"""Workers for a type of device: how many, and what they are told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from allstep.errors import ConfigurationError
from allstep.launch.device_types import devices_of, rocm_gpus, tpu_chips, tpu_environment
from allstep.launch.devices import CudaHardware


@pytest.mark.parametrize(
    ("kind", "environ", "count"),
    [
        (None, {}, 2),
        ("cuda", {}, 2),
        ("cpu", {}, 0),
        ("xpu", {}, 0),
        ("xla", {}, 4),
        ("xla", {"PJRT_DEVICE": "CPU"}, 0),
        ("xla", {"XLA_USE_SPMD": "1"}, 0),
        (None, {"PJRT_DEVICE": "TPU"}, 4),
        (None, {"PJRT_DEVICE": "CPU"}, 2),
        ("tpu", {}, 4),
    ],
)
def test_workers_are_as_many_as_there_are_devices_of_the_type(kind, environ, count):
    found = devices_of(kind, environ, lambda: CudaHardware(("GPU-1", "GPU-2")), lambda: 4, lambda: 8)
    assert (found.count, found.apart) == (count, False)


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, 8),
        ({"HIP_VISIBLE_DEVICES": "0,3"}, 2),
        ({"ROCR_VISIBLE_DEVICES": "0,1,2", "HIP_VISIBLE_DEVICES": "1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"HIP_VISIBLE_DEVICES": "-1"}, 0),
    ],
)
def test_gpus_of_amd_are_counted_where_there_is_no_other(environ, count):
    assert devices_of(None, environ, CudaHardware, lambda: 0, lambda: 8).count == count


def test_gpus_of_amd_are_told_from_cpus_of_its_topology(tmp_path):
    for at, units in enumerate((0, 0, 440, 440)):
        (tmp_path / str(at)).mkdir()
        (tmp_path / str(at) / "properties").write_text(f"cpu_cores_count 0\nsimd_count {units}\nmem_banks_count 1\n")
    assert rocm_gpus(tmp_path) == 2
    assert rocm_gpus(tmp_path / "no folder") == 0


def test_chips_are_told_from_other_devices_of_their_maker(tmp_path):
    for at, (vendor, device) in enumerate([("0x1ae0", "0x0063"), ("0x1ae0", "0x0042"), ("0x8086", "0x0063")]):
        folder = tmp_path / str(at)
        folder.mkdir()
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(device + "\n")
    (tmp_path / "without").mkdir()
    assert tpu_chips(tmp_path) == 1
    assert tpu_chips(tmp_path / "no folder") == 0


def fake_torch(folder: Path, body: str) -> dict[str, str]:
    """An environment in which `torch.tpu.distributed.set_tpu_launch_env` does `body`."""
    package = folder / "torch" / "tpu"
    package.mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    (package / "__init__.py").touch()
    text = f"import os\ndef set_tpu_launch_env(*, nnodes, nproc_per_node):\n    {body}\n"
    (package / "distributed.py").write_text(text)
    return os.environ | {"PYTHONPATH": str(folder)}


def test_torch_tpu_says_what_its_ranks_agree_on(tmp_path):
    environ = fake_torch(tmp_path, "os.environ.update(TORCH_TPU_TOPOLOGY=f'{nproc_per_node},{nnodes}', OTHER='1')")
    assert tpu_environment(4, 2, environ) == {"TORCH_TPU_TOPOLOGY": "4,2"}


def test_what_torch_tpu_misses_is_told(tmp_path):
    environ = fake_torch(tmp_path, "raise ValueError('expected TPU devices, got none')")
    with pytest.raises(ConfigurationError, match="expected TPU devices, got none"):
        tpu_environment(4, 1, environ)
