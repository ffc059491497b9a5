"""How the devices are: what the driver's own tool says of their health, and whether the job is shown any.

Contract: NVIDIA's `nvidia-smi -q -x` is asked once. Its words have changed over the years, so what it does not say is
taken for well. Of AMD's devices the number is compared between the kernel and rocm-smi.
"""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass

from allstep.host_checks.finding import Host, HostFinding, ask
from allstep.host_checks.torch_build import kernel_devices
from allstep.protocol.foreign_text import one_line

_REASONS = ("clocks_event_reasons", "clocks_throttle_reasons")  # newer drivers, older drivers
_SLOWED = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU as nvidia-smi describes it.

    Args:
        index: in the tool's order.
        name: of the product.
        mig: whether it is divided into MIG instances.
        instances: how many.
        uncorrected: errors of its memory since the driver was loaded that could not be corrected.
        repair: what is to be done about rows of its memory: "", "pending" or "failed".
        slowed: reasons for which its clock is held down.
        width: lanes of its link, and how many there could be; equal where unknown.
        processes: the ids and names of programs on it.
        prohibited: whether no program may use it.
    """

    index: int
    name: str
    mig: bool = False
    instances: int = 0
    uncorrected: int = 0
    repair: str = ""
    slowed: tuple[str, ...] = ()
    width: tuple[int, int] = (0, 0)
    processes: tuple[tuple[int, str], ...] = ()
    prohibited: bool = False


def read_states(text: str) -> list[GpuState]:
    """Read what `nvidia-smi -q -x` prints; raises ValueError where it is no such text."""
    try:
        tree = ET.fromstring(text)
    except ET.ParseError as error:
        raise ValueError(f"nvidia-smi printed no XML: {error}") from None
    return [_state(index, gpu) for index, gpu in enumerate(tree.iter("gpu"))]


def check_accelerators(host: Host) -> Iterator[HostFinding]:
    """GPUs of both makers; a machine without any is well."""
    kernel = kernel_devices(host)
    said = None
    try:
        said = ask(["nvidia-smi", "-q", "-x"], host)
    except FileNotFoundError:
        if kernel.nvidia:
            text = f"the driver shows {kernel.nvidia} GPUs, and nvidia-smi is not here to tell how they are"
            yield HostFinding("GPUs", "warning", text, "In a container ask for the capability `utility`")
    if said is not None and said.problem and (kernel.nvidia or kernel.nvidia_on_bus):
        remedy = "Reload the driver or restart the machine; dmesg has lines with NVRM or Xid"
        yield HostFinding("GPUs", "bad", said.problem, remedy)
    elif said is not None and not said.problem:
        try:
            states = read_states(said.out)
        except ValueError as error:
            yield HostFinding("GPUs", "bad", one_line(str(error)), "Reload the driver or restart the machine")
        else:
            visible = host.visible()
            yield from judge_states(states, host.environ.get("CUDA_VISIBLE_DEVICES"), visible, _family())
            if kernel.nvidia > len(states) and (permitted := _permitted(host)) > len(states):
                text = f"this process may use {permitted} GPUs, and nvidia-smi shows {len(states)}"
                yield HostFinding("GPUs", "bad", text, "One has fallen off the bus: look at dmesg, restart the machine")
    if kernel.amd:
        yield _judge_amd(host, kernel.amd)
    elif not kernel.nvidia and (said is None or said.problem):
        yield HostFinding("GPUs", "good", "none, so ranks use the CPU")


def judge_states(
    states: list[GpuState], listed: str | None, visible: tuple[str, ...], own: frozenset[int]
) -> Iterator[HostFinding]:
    """Say what is wrong with any of the GPUs.

    Args:
        states: all of the machine's.
        listed: CUDA_VISIBLE_DEVICES, or None.
        visible: those of them that it shows.
        own: ids of processes that are not somebody else's.
    """
    if listed is not None and listed.strip() not in ("", "-1") and states and not visible:
        text = f"CUDA_VISIBLE_DEVICES is {one_line(listed)!r}, which names none of this machine's {len(states)} GPUs"
        yield HostFinding("GPUs", "bad", text, "Unset it, or name GPUs as `nvidia-smi -L` lists them")
    if len({state.mig for state in states}) > 1:
        divided = ", ".join(str(state.index) for state in states if state.mig)
        text = f"GPU {divided} is divided into MIG instances, and the others are not; ranks would be of unequal speed"
        yield HostFinding("GPUs", "warning", text, "nvidia-smi -mig 0 (or 1) for all of them, by the administrator")
    ill = [finding for state in states for finding in _ill(state, own)]
    yield from ill
    if not ill and states:
        names = " and ".join(sorted({state.name for state in states}))
        yield HostFinding("GPUs", "good", f"{len(states)} x {names}, {len(visible)} shown to ranks")


def _ill(state: GpuState, own: frozenset[int]) -> Iterator[HostFinding]:
    which = f"GPU {state.index} ({state.name})"
    if state.mig and not state.instances:
        text = f"{which} is in MIG mode and has no instance, so nothing can use it"
        yield HostFinding(
            "GPUs", "bad", text, "nvidia-smi mig -cgi ... -C makes instances; nvidia-smi -mig 0 ends the mode"
        )
    if state.prohibited:
        yield HostFinding(
            "GPUs", "bad", f"{which}: no program may use it", "nvidia-smi -c DEFAULT, by the administrator"
        )
    if state.uncorrected:
        text = f"{which} had {state.uncorrected} errors of its memory that could not be corrected"
        yield HostFinding(
            "GPUs", "bad", text, "Take the machine out of use: reset the GPU; if they come back, replace it"
        )
    if state.repair:
        text = f"{which}: the repair of its memory {'is pending' if state.repair == 'pending' else 'failed'}"
        remedy = "Reset the GPU or restart the machine" if state.repair == "pending" else "Have the GPU replaced"
        yield HostFinding("GPUs", "warning" if state.repair == "pending" else "bad", text, remedy)
    if state.slowed:
        text = f"{which}: its clock is held down ({', '.join(state.slowed)})"
        yield HostFinding(
            "GPUs", "warning", text, "Look at its temperature, fans and power: nvidia-smi -q -d PERFORMANCE"
        )
    now, possible = state.width
    if 0 < now < possible:
        text = f"{which}: its link has {now} lanes of {possible}"
        yield HostFinding("GPUs", "warning", text, "Have the card reseated, or the slot looked at")
    others = [(pid, name) for pid, name in state.processes if pid not in own]
    if others:
        shown = ", ".join(f"{pid} {one_line(name)}" for pid, name in others[:3])
        text = f"{which}: {len(others)} programs use it already ({shown})"
        yield HostFinding("GPUs", "warning", text, "Wait for them, end them if they are yours, or choose other GPUs")


def _state(index: int, gpu: ET.Element) -> GpuState:
    volatile = gpu.find("ecc_errors/volatile")
    counted = [each for each in (volatile if volatile is not None else ()) if "uncorrectable" in each.tag]
    if volatile is not None and not counted:  # drivers before 440 counted by width of the error
        counted = volatile.findall("double_bit/total")
    slowed = [
        word.replace("_", " ")
        for group in _REASONS
        for word in _SLOWED
        if _said(gpu, f"{group}/{group[:-1]}_{word}") == "Active"
    ]
    repair = "pending" if _said(gpu, "remapped_rows/remapped_row_pending") == "Yes" else ""
    if "Yes" in (_said(gpu, "retired_pages/pending_retirement"), _said(gpu, "retired_pages/pending_blacklist")):
        repair = "pending"
    if _said(gpu, "remapped_rows/remapped_row_failure") == "Yes":
        repair = "failed"
    width = "pci/pci_gpu_link_info/link_widths"
    return GpuState(
        index=index,
        name=one_line(_said(gpu, "product_name") or "unnamed"),
        mig=_said(gpu, "mig_mode/current_mig") == "Enabled",
        instances=len(gpu.findall("mig_devices/mig_device")),
        uncorrected=sum(_number(each.text) for each in counted),
        repair=repair,
        slowed=tuple(slowed),
        width=(_number(_said(gpu, f"{width}/current_link_width")), _number(_said(gpu, f"{width}/max_link_width"))),
        processes=tuple(
            (_number(_said(each, "pid")), _said(each, "process_name"))
            for each in gpu.iter("process_info")
            if "C" in _said(each, "type")  # it computes; others only draw
        ),
        prohibited=_said(gpu, "compute_mode") == "Prohibited",
    )


def _said(element: ET.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _number(text: str | None) -> int:
    digits = (text or "").strip().removesuffix("x")
    return int(digits) if digits.isdecimal() else 0


def _permitted(host: Host) -> int:
    """How many of NVIDIA's devices the kernel lets this process open: a job's cgroup may keep it from some."""
    count = 0
    for name in host.names("dev"):
        if re.fullmatch(r"nvidia\d+", name):
            try:
                os.close(os.open(host.root / "dev" / name, os.O_RDWR | os.O_NONBLOCK))
            except PermissionError:
                continue
            except OSError:
                pass  # it is there, and does not work
            count += 1
    return count


def _judge_amd(host: Host, kernel: int) -> HostFinding:
    try:
        said = ask(["rocm-smi", "--showid", "--json"], host)
    except FileNotFoundError:
        return HostFinding("GPUs", "good", f"{kernel} of AMD's; rocm-smi is not here to tell how they are")
    if said.problem:
        return HostFinding(
            "GPUs", "bad", said.problem, "Reload the driver or restart the machine; dmesg has lines of amdgpu"
        )
    try:
        count = sum(name.startswith("card") for name in json.loads(said.out))
    except ValueError:
        return HostFinding("GPUs", "warning", "rocm-smi printed no JSON", "Look at what rocm-smi says")
    if count < kernel:
        text = f"the driver shows {kernel} GPUs, and rocm-smi {count}"
        return HostFinding("GPUs", "bad", text, "One has failed: look at dmesg for amdgpu, restart the machine")
    return HostFinding("GPUs", "good", f"{count} of AMD's")


def _family() -> frozenset[int]:
    """This process and its parents, which a notebook or an outer run may be."""
    import psutil

    own = psutil.Process(os.getpid())
    return frozenset([own.pid, *(each.pid for each in own.parents())])
