"""Whether torch's build fits the devices and the driver, from what machines of other kinds were recorded to show."""

from __future__ import annotations

from pathlib import Path

import pytest

from allstep.host_checks import Host, Verdict
from allstep.host_checks.torch_build import KernelDevices, TorchAnswer, judge_torch, kernel_devices
from tests.host_checks.recorded import files, only

CPU = TorchAnswer("2.13.0+cpu")
CUDA = TorchAnswer("2.13.0", cuda="13.0", nccl="2.28.9", driver=13000)


@pytest.mark.parametrize(
    ("answer", "kernel", "environ", "verdict", "words"),
    [
        (CPU, KernelDevices(), {}, "good", "for the CPU"),
        (CPU, KernelDevices(nvidia=4), {}, "bad", "built for the CPU, and this machine has 4 NVIDIA GPUs"),
        (CPU, KernelDevices(nvidia=4), {"CUDA_VISIBLE_DEVICES": ""}, "good", "for the CPU"),
        (CPU, KernelDevices(amd=1), {}, "bad", "built for the CPU, and this machine has 1 AMD GPU"),
        (CUDA, KernelDevices(), {}, "good", "has no GPU"),
        (CUDA, KernelDevices(nvidia_on_bus=8), {}, "bad", "8 NVIDIA GPUs on the bus without a driver"),
        (CUDA, KernelDevices(nvidia=2), {}, "bad", "cannot use the 2 GPUs that the driver shows"),
        (CUDA, KernelDevices(nvidia=2), {"CUDA_VISIBLE_DEVICES": "-1"}, "good", "shows it no device"),
    ],
)
def test_torchs_build_is_compared_with_the_devices(
    answer: TorchAnswer, kernel: KernelDevices, environ: dict[str, str], verdict: Verdict, words: str
) -> None:
    finding = only(judge_torch(answer, kernel, environ))
    assert finding.verdict == verdict
    assert words in finding.text


def test_a_driver_that_is_too_old_is_named_with_the_build_that_it_serves() -> None:
    answer = TorchAnswer("2.13.0", cuda="13.0", driver=12040)
    finding = only(judge_torch(answer, KernelDevices(nvidia=1), {}))
    assert "it serves CUDA 12.4" in finding.text
    assert "cu124" in finding.remedy
    works = TorchAnswer("2.13.0", cuda="12.8", driver=12040, available=True, devices=1)  # of one major version
    assert only(judge_torch(works, KernelDevices(nvidia=1), {})).verdict == "good"


@pytest.mark.parametrize(
    ("arches", "capability", "words"),
    [
        (["sm_80", "sm_90"], [9, 0], ""),
        (["sm_80", "sm_90"], [8, 9], ""),  # of the same major version
        (["sm_80", "sm_90"], [7, 0], "no code for sm_70, which devices here are; it has sm_80, sm_90"),
        (["sm_80", "sm_90"], [12, 0], "no code for sm_120"),
        (["sm_80", "compute_90"], [12, 0], ""),  # compiled when it is loaded
        (["sm_90a"], [9, 0], ""),
        ([], [9, 0], ""),  # this build does not say
    ],
)
def test_devices_that_torch_has_no_code_for_are_named(arches: list[str], capability: list[int], words: str) -> None:
    answer = TorchAnswer("2.9", cuda="12.8", available=True, devices=1, arches=arches, capabilities=[capability])
    finding = only(judge_torch(answer, KernelDevices(nvidia=1), {}))
    assert finding.verdict == ("bad" if words else "good")
    assert words in finding.text


def test_rocm_is_judged_by_its_own_devices() -> None:
    answer = TorchAnswer("2.13.0+rocm6.4", hip="6.4")
    assert only(judge_torch(answer, KernelDevices(amd=8), {})).verdict == "bad"
    assert only(judge_torch(answer, KernelDevices(), {})).verdict == "good"


def test_several_installed_copies_are_named() -> None:
    answer = TorchAnswer("2.13.0+cpu", file="/a/torch/__init__.py", copies=["2.13.0 in /a", "2.9.0 in /b"])
    first, _ = judge_torch(answer, KernelDevices(), {})
    assert first.verdict == "warning"
    assert "2.13.0 in /a; 2.9.0 in /b; /a/torch/__init__.py is what Python imports" in first.text


def test_devices_are_counted_by_what_the_kernel_shows(tmp_path: Path) -> None:
    pci = "sys/bus/pci/devices/"
    nodes = "sys/class/kfd/kfd/topology/nodes/"
    files(
        tmp_path,
        {
            "proc/driver/nvidia/gpus/0000:01:00.0/information": "",
            f"{pci}0000:01:00.0/class": "0x030200\n",
            f"{pci}0000:01:00.0/vendor": "0x10de\n",
            f"{pci}0000:02:00.0/class": "0x020000\n",  # NVIDIA's network adapters are none
            f"{pci}0000:02:00.0/vendor": "0x10de\n",
            f"{nodes}0/gpu_id": "0\n",
            f"{nodes}1/gpu_id": "51235\n",
        },
    )
    assert kernel_devices(Host({}, tmp_path, root=tmp_path)) == KernelDevices(1, 1, 1)
