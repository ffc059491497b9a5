"""How many workers `auto` means, as tables over environment and hardware."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from allstep.launch.devices import (
    CudaHardware,
    Devices,
    device_environment,
    parse_listing,
    probe_hardware,
    visible_devices,
)
from tests.jobs.launchers import script
from tests.jobs.running import run

NONE = CudaHardware()
FOUR = CudaHardware(("GPU-aa01", "GPU-aa02", "GPU-bb03", "GPU-cc04"))
FOUR_UNNAMED = CudaHardware(("",) * 4)
SLICED = CudaHardware(("GPU-aa01",), ("MIG-1", "MIG-2", "MIG-3"))


@pytest.mark.parametrize(
    ("listed", "hardware", "names"),
    [
        (None, NONE, ()),
        (None, FOUR, ("0", "1", "2", "3")),
        (None, FOUR_UNNAMED, ("0", "1", "2", "3")),
        ("0", FOUR, ("0",)),
        ("2,0", FOUR, ("2", "0")),
        (" 1 , 3 ", FOUR, ("1", "3")),
        ("0,1", NONE, ()),  # listed, but the machine has none
        ("0,1,7,2", FOUR, ("0", "1")),  # the first that names nothing ends the list
        ("0,-1,1", FOUR, ("0",)),
        ("1,1", FOUR, ()),  # CUDA takes no device named twice
        ("GPU-aa01,GPU-cc", FOUR, ("GPU-aa01", "GPU-cc")),  # a beginning is enough
        ("GPU-aa01,GPU-zz", FOUR, ("GPU-aa01",)),
        ("GPU-aa01,GPU-zz", FOUR_UNNAMED, ("GPU-aa01", "GPU-zz")),
        ("MIG-1,MIG-3", SLICED, ("MIG-1", "MIG-3")),
        (None, SLICED, ("MIG-1", "MIG-2", "MIG-3")),
    ],
)
def test_visible_devices_are_those_that_cuda_would_show(
    listed: str | None, hardware: CudaHardware, names: tuple[str, ...]
) -> None:
    environ = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert visible_devices(environ, lambda: hardware).names == names


@pytest.mark.parametrize("listed", ["", " ", "-1", "NoDevFiles", "none", "all"])
def test_the_hardware_is_not_asked_where_the_environment_hides_it(listed: str) -> None:
    def probe() -> CudaHardware:
        raise AssertionError("asked")

    assert visible_devices({"CUDA_VISIBLE_DEVICES": listed}, probe) == Devices()


def test_each_worker_is_shown_its_own_mig_instance_and_others_see_all_devices() -> None:
    mig = visible_devices({}, lambda: SLICED)
    assert device_environment(mig, 1, 3) == {"CUDA_VISIBLE_DEVICES": "MIG-2"}
    assert device_environment(mig, 1, 4) == {}
    assert device_environment(visible_devices({}, lambda: FOUR), 1, 4) == {}


def test_the_listing_of_nvidia_smi_gives_gpus_and_mig_instances() -> None:
    text = (
        "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)\n"
        "  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)\n"
        "  MIG 2g.10gb     Device  1: (UUID: MIG-GPU-5d5ba0d6/5/0)\n"
        "GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-7b1a0000-d33d-2b2c-524d-9e3d8d2b8a77)\n"
    )
    assert parse_listing(text) == CudaHardware(
        ("GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77", "GPU-7b1a0000-d33d-2b2c-524d-9e3d8d2b8a77"),
        ("MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", "MIG-GPU-5d5ba0d6/5/0"),
        (0, 0),
    )


BOTH_SLICED = CudaHardware(("GPU-aa01", "GPU-aa02", "GPU-aa03"), ("MIG-1", "MIG-2", "MIG-3", "MIG-4"), (0, 0, 2, 2))


@pytest.mark.parametrize(
    ("listed", "hardware", "names", "count"),
    [
        (None, FOUR, ("0", "1", "2", "3"), 4),
        (None, SLICED, ("MIG-1", "MIG-2", "MIG-3"), 1),
        # Whole GPUs beside sliced ones; first of all one device of each.
        (None, BOTH_SLICED, ("MIG-1", "GPU-aa02", "MIG-3", "MIG-2", "MIG-4"), 3),
        ("MIG-2,MIG-1,MIG-4", BOTH_SLICED, ("MIG-2", "MIG-4", "MIG-1"), 2),
        ("GPU-aa02,MIG-1", BOTH_SLICED, ("GPU-aa02", "MIG-1"), 2),
        ("MIG-GPU-aa01/5/0,MIG-GPU-aa01/6/0", BOTH_SLICED, ("MIG-GPU-aa01/5/0", "MIG-GPU-aa01/6/0"), 1),
    ],
)
def test_auto_means_one_worker_for_each_gpu_sliced_or_not(listed, hardware, names, count):
    devices = visible_devices({} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}, lambda: hardware)
    assert (devices.names, devices.count) == (names, count)
    assert bool(devices.unused) == (count < len(names))


def test_workers_are_shown_the_devices_of_different_gpus_first():
    devices = visible_devices({}, lambda: BOTH_SLICED)
    shown = [device_environment(devices, rank, 3)["CUDA_VISIBLE_DEVICES"] for rank in range(3)]
    assert shown == ["MIG-1", "GPU-aa02", "MIG-3"]
    assert "2 of 5 MIG instances and GPUs stay unused" in devices.unused


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a script in the place of nvidia-smi."""

    def put(script: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return put


def test_the_probe_believes_nvidia_smi(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("echo 'GPU 0: H200 (UUID: GPU-12ab)'")
    assert probe_hardware() == CudaHardware(("GPU-12ab",))


def test_the_probe_says_how_nvidia_smi_failed(nvidia_smi: Callable[[str], None], monkeypatch) -> None:
    monkeypatch.setattr("allstep.launch.devices._devices_shown", lambda: 2)
    nvidia_smi("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 9")
    found = probe_hardware()
    assert found.gpus == ("", "")
    assert found.doubt == (
        "nvidia-smi failed with exit code 9 and said: Failed to initialize NVML: Driver/library version mismatch. "
        "The driver shows 2 GPUs"
    )
    assert visible_devices({}, lambda: found).doubt == found.doubt
    assert visible_devices({}, lambda: CudaHardware(doubt="why")) == Devices(doubt="why")


def test_a_number_of_workers_that_is_in_doubt_is_told(nvidia_smi: Callable[[str], None], tmp_path: Path) -> None:
    nvidia_smi("echo 'No devices were found' >&2; exit 6")
    env = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "0"}
    target = script(tmp_path, "print('ran')")
    job = run(tmp_path, target, env=env)
    assert "warning: nvidia-smi failed with exit code 6 and said: No devices were found" in job.err
    assert "1 worker will be started; give --nproc for another number" in job.err
    assert "warning" not in run(tmp_path, "--nproc", "1", target, env=env).err
