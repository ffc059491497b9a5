"""What the checks decide, from what machines of other kinds were recorded to show."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from allstep.host_checks import Host, HostFinding, Verdict
from allstep.host_checks.accelerators import judge_states, read_states
from allstep.host_checks.clocks import judge_clock
from allstep.host_checks.limits import (
    check_memory,
    cpu_quota,
    judge_cores,
    judge_memory,
    judge_resource_limits,
    judge_shared_memory,
)
from allstep.host_checks.network import judge_host_name, judge_interfaces
from allstep.host_checks.run_folder import Mount, judge_mount, judge_room, judge_steps, mount_of, read_steps
from allstep.host_checks.scheduler import judge_settings, read_partitions, read_settings
from allstep.host_checks.software import judge_requirements
from tests.host_checks.recorded import files, only

GIB = 1 << 30


def gpu(**parts: str) -> str:
    """One GPU in the words of nvidia-smi, well but for these parts."""
    well = {
        "mig": "Disabled",
        "instances": "None",
        "compute": "Default",
        "ecc": "<sram_uncorrectable_parity>0</sram_uncorrectable_parity><dram_uncorrectable>0</dram_uncorrectable>",
        "remap": "<remapped_row_pending>No</remapped_row_pending><remapped_row_failure>No</remapped_row_failure>",
        "slowed": "<clocks_event_reasons><clocks_event_reason_hw_slowdown>Not Active</clocks_event_reason_hw_slowdown>"
        "</clocks_event_reasons>",
        "lanes": "16x",
        "processes": "",
    } | parts
    return f"""<gpu id="0"><product_name>NVIDIA H100 80GB HBM3</product_name>
    <mig_mode><current_mig>{well["mig"]}</current_mig></mig_mode><mig_devices>{well["instances"]}</mig_devices>
    <compute_mode>{well["compute"]}</compute_mode><ecc_errors><volatile>{well["ecc"]}</volatile></ecc_errors>
    <retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
    <remapped_rows>{well["remap"]}</remapped_rows>{well["slowed"]}<pci><pci_gpu_link_info><link_widths>
    <max_link_width>16x</max_link_width><current_link_width>{well["lanes"]}</current_link_width></link_widths>
    </pci_gpu_link_info></pci><processes>{well["processes"]}</processes></gpu>"""


def gpu_findings(*gpus: str, listed: str | None = None, visible: tuple[str, ...] = ("0",)) -> list[HostFinding]:
    text = f'<?xml version="1.0"?><nvidia_smi_log><cuda_version>13.0</cuda_version>{"".join(gpus)}</nvidia_smi_log>'
    return list(judge_states(read_states(text), listed, visible, frozenset([7])))


BUSY = "<process_info><pid>{}</pid><type>C</type><process_name>python</process_name></process_info>"


@pytest.mark.parametrize(
    ("parts", "verdict", "words"),
    [
        ({"ecc": "<dram_uncorrectable>3</dram_uncorrectable>"}, "bad", "3 errors of its memory"),
        ({"ecc": "<double_bit><total>2</total></double_bit>"}, "bad", "2 errors of its memory"),  # of older drivers
        (
            {"remap": "<remapped_row_pending>Yes</remapped_row_pending>"},
            "warning",
            "the repair of its memory is pending",
        ),
        ({"remap": "<remapped_row_failure>Yes</remapped_row_failure>"}, "bad", "the repair of its memory failed"),
        (
            {
                "slowed": "<clocks_throttle_reasons><clocks_throttle_reason_hw_thermal_slowdown>Active"
                "</clocks_throttle_reason_hw_thermal_slowdown></clocks_throttle_reasons>"
            },
            "warning",
            "its clock is held down (hw thermal slowdown)",
        ),
        ({"lanes": "4x"}, "warning", "its link has 4 lanes of 16"),
        ({"compute": "Prohibited"}, "bad", "no program may use it"),
        ({"mig": "Enabled"}, "bad", "is in MIG mode and has no instance"),
        ({"processes": BUSY.format(4711)}, "warning", "1 programs use it already (4711 python)"),
    ],
)
def test_what_is_wrong_with_a_gpu_is_named(parts: dict[str, str], verdict: Verdict, words: str) -> None:
    finding = only(gpu_findings(gpu(**parts)))
    assert finding.verdict == verdict
    assert words in finding.text
    assert "GPU 0 (NVIDIA H100 80GB HBM3)" in finding.text


def test_gpus_that_are_well_are_counted_in_one_line() -> None:
    finding = only(gpu_findings(gpu(), gpu(processes=BUSY.format(7)), visible=("0", "1")))
    assert finding.text == "2 x NVIDIA H100 80GB HBM3, 2 shown to ranks"


def test_gpus_that_are_divided_in_part_and_variables_that_name_none() -> None:
    mixed = gpu_findings(gpu(), gpu(mig="Enabled", instances="<mig_device/>"))
    assert "GPU 1 is divided into MIG instances" in mixed[0].text
    first = gpu_findings(gpu(), listed="GPU-gone", visible=())[0]
    assert first.verdict == "bad"
    assert "CUDA_VISIBLE_DEVICES is 'GPU-gone', which names none of this machine's 1 GPUs" in first.text


def test_what_is_no_listing_of_gpus_is_refused() -> None:
    with pytest.raises(ValueError, match="no XML"):
        read_states("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver")


def test_requirements_are_compared_with_what_is_installed() -> None:
    wanted = ["torch>=2.9", "numpy>=1.26", "tqdm>=4.65; extra == 'progress'"]
    assert only(judge_requirements(wanted, [], {"torch": "2.13.0+cpu", "numpy": "2.0"}.get)).verdict == "good"
    finding = only(judge_requirements(wanted, [], {"torch": "2.7.1"}.get))
    assert finding.text == "torch is 2.7.1, and >=2.9 is needed; numpy is not installed"
    assert finding.remedy == "pip install 'torch>=2.9' 'numpy>=1.26'"


def test_a_library_of_another_version_than_torch_was_built_for_is_a_warning() -> None:
    by_torch = ["sympy>=1.13", "nvidia-nccl-cu12==2.27.5; platform_system != 'Nowhere'", "opt-einsum; extra == 'more'"]
    installed = {"torch": "2.9", "sympy": "1.14", "nvidia-nccl-cu12": "2.21.5"}
    finding = only(judge_requirements(["torch>=2.9"], by_torch, installed.get))
    assert finding.verdict == "warning"
    assert "built for other libraries: nvidia-nccl-cu12 is 2.21.5, and ==2.27.5 is needed" in finding.text
    assert finding.remedy == "pip install 'nvidia-nccl-cu12==2.27.5'"


@pytest.mark.parametrize(
    ("found", "nodes", "verdict"),
    [
        (["127.0.1.1"], 1, "good"),
        (["127.0.1.1"], 2, "warning"),
        (["::1", "10.0.0.7"], 2, "good"),
        (["10.99.0.1"], 1, "warning"),  # of another machine, or of none
        (["10.99.0.1"], 2, "bad"),
    ],
)
def test_a_name_has_to_mean_this_machine_and_among_several_not_by_loopback(
    found: list[str], nodes: int, verdict: Verdict
) -> None:
    assert only([judge_host_name("node7", found, nodes, {"127.0.0.1", "10.0.0.7"})]).verdict == verdict


ADDRESSES = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.7"], "eth1": ["10.1.0.7"], "ib0": []}


@pytest.mark.parametrize(
    ("environ", "verdict", "words"),
    [
        ({}, "good", "eth0 10.0.0.7"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, "good", "eth0"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "bad", "no such interface"),  # gloo takes whole names
        ({"GLOO_SOCKET_IFNAME": "eth1"}, "bad", "eth1 is down or has no address"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, "good", "eth0"),  # NCCL takes prefixes
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "bad", "no such interface"),
        ({"NCCL_SOCKET_IFNAME": "^lo,ib"}, "good", "eth0"),
        ({"NCCL_SOCKET_IFNAME": "ib"}, "bad", "ib0 is down or has no address"),
        ({"TP_SOCKET_IFNAME": "wlan0"}, "bad", "TP_SOCKET_IFNAME is 'wlan0'"),
    ],
)
def test_variables_that_name_interfaces_are_read_as_each_library_does(
    environ: dict[str, str], verdict: Verdict, words: str
) -> None:
    finding = only(judge_interfaces(Host(environ, Path()), {"lo", "eth0", "ib0"}, ADDRESSES))
    assert finding.verdict == verdict
    assert words in finding.text


@pytest.mark.parametrize(("free", "verdict"), [(64 << 20, "bad"), (500 << 20, "warning"), (8 * GIB, "good")])
def test_shared_memory_is_judged_by_what_is_free(free: int, verdict: Verdict) -> None:
    assert only([judge_shared_memory(max(free, GIB), free)]).verdict == verdict


def test_limits_of_files_threads_and_locked_memory() -> None:
    assert only(judge_resource_limits(math.inf, math.inf, math.inf, 8)).verdict == "good"
    assert "may open 1024 files" in only(judge_resource_limits(1024, math.inf, math.inf, 1)).text
    few = only(judge_resource_limits(1 << 16, 40, math.inf, 8))
    assert (few.verdict, "40 more threads and processes" in few.text) == ("bad", True)
    assert "RLIMIT_MEMLOCK" in only(judge_resource_limits(1 << 16, math.inf, 8 << 20, 1)).text


VERSION_2 = {
    "proc/self/cgroup": "0::/job_7/step_0\n",
    "proc/meminfo": "MemTotal:       528280000 kB\n",
    "sys/fs/cgroup/job_7/memory.max": "8589934592\n",
    "sys/fs/cgroup/job_7/memory.events": "low 0\noom 4\noom_kill 3\n",
    "sys/fs/cgroup/job_7/step_0/memory.max": "max\n",
    "sys/fs/cgroup/job_7/cpu.max": "400000 100000\n",
    "sys/fs/cgroup/job_7/step_0/cpu.max": "max 100000\n",
}
VERSION_1 = {
    "proc/self/cgroup": "4:memory:/slurm/job_7\n3:cpu,cpuacct:/slurm/job_7\n",
    "proc/meminfo": "MemTotal:       528280000 kB\n",
    "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "8589934592\n",
    "sys/fs/cgroup/memory/slurm/job_7/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
    "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "400000\n",
    "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000\n",
}
CONTAINER = {  # its own group is what is mounted, and the path is the host's
    "proc/self/cgroup": "0::/../../docker/abc\n",
    "proc/meminfo": "MemTotal:       528280000 kB\n",
    "sys/fs/cgroup/memory.max": "8589934592\n",
    "sys/fs/cgroup/memory.events": "oom_kill 3\n",
    "sys/fs/cgroup/cpu.max": "400000 100000\n",
}


@pytest.mark.parametrize("recorded", [VERSION_2, VERSION_1, CONTAINER], ids=["2", "1", "container"])
def test_the_limits_of_cgroups_of_both_versions_are_read(recorded: dict[str, str], tmp_path: Path) -> None:
    host = Host({}, tmp_path, workers=1, root=files(tmp_path, recorded))
    kills, small = check_memory(host)
    assert "killed 3 processes for want of memory" in kills.text
    assert small.text == "this memory cgroup may use only 8 GiB of the machine's 504 GiB"
    assert cpu_quota(host) == 4


def test_memory_is_judged_by_rank() -> None:
    assert only(judge_memory(32 * GIB, None, 0, 8)).verdict == "good"
    assert only(judge_memory(32 * GIB, 4 * GIB, 0, 8)).verdict == "bad"


@pytest.mark.parametrize(
    ("cores", "quota", "threads", "ranks", "verdict"),
    [
        (64, math.inf, None, 8, "good"),
        (64, math.inf, "8", 8, "good"),
        (64, math.inf, "9", 8, "warning"),
        (64, math.inf, "eight", 8, "warning"),
        (64, 4.0, None, 1, "warning"),
        (64, 4.0, "4", 1, "good"),
        (1, math.inf, "1", 8, "warning"),
    ],
)
def test_threads_are_compared_with_cores(
    cores: int, quota: float, threads: str | None, ranks: int, verdict: Verdict
) -> None:
    assert only(judge_cores(cores, quota, threads, ranks)).verdict == verdict


MOUNTS = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
60 27 0:50 / /home rw,relatime shared:1 - nfs4 server:/home rw,vers=4.2,hard,acregmax=60
61 27 0:51 / /home/big\\040disk ro,relatime - lustre a@tcp:/x rw
"""


def test_the_mount_of_a_folder_is_the_nearest_above_it() -> None:
    assert mount_of("/homework", MOUNTS) == Mount("/", "ext4", ("rw", "relatime", "rw", "discard"))
    assert getattr(mount_of("/home/me", MOUNTS), "kind", "") == "nfs4"
    read_only = mount_of("/home/big disk/runs", MOUNTS)
    assert read_only is not None
    assert "mounted read-only" in only(judge_mount(read_only, "here")).text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("rw", "hard", "acregmax=60", "local_lock=none"), ""),
        (("rw", "soft"), "is mounted soft"),
        (("rw", "hard", "nolock"), "locks hold on this machine only"),
        (("rw", "hard", "actimeo=600"), "may not see for 600 s"),
    ],
)
def test_options_of_nfs_that_surprise_are_named(options: tuple[str, ...], words: str) -> None:
    found = list(judge_mount(Mount("/home", "nfs4", options), "here"))
    assert [words in each.text for each in found] == ([True] if words else [])


STEPS = {"create": {"ahead": 0.0}, "sync": {"seconds": 0.01}, "write": {"bytes": 64 << 20, "seconds": 0.5}}


@pytest.mark.parametrize(
    ("changed", "verdict", "words"),
    [
        ({"replace": {"works": False}}, "bad", "cannot be renamed over another"),
        ({"exclusive": {"works": False}}, "bad", "two jobs could take one folder"),
        ({"lock": {"error": "No locks available", "errno": 37}}, "warning", "No locks available"),
        ({"sync": {"seconds": 4.0}}, "warning", "takes 4.0 s to write a few bytes through"),
        ({"write": {"bytes": 8 << 20, "seconds": 4.0}}, "warning", "written at 2.0 MiB/s"),
        ({"create": {"ahead": -61.0}}, "warning", "is 61 s behind this machine's"),
    ],
)
def test_what_a_file_system_does_not_do_is_named(
    changed: dict[str, dict[str, object]], verdict: Verdict, words: str
) -> None:
    finding = only(judge_steps({**STEPS, **changed}, "here"))
    assert finding.verdict == verdict
    assert words in finding.text


def test_a_file_server_that_fell_silent_is_named_with_what_it_was_to_do() -> None:
    results, silent = read_steps('create\n{"ahead": 0.0}\nreplace\n')
    assert (list(results), silent) == (["create"], "replace")


def test_room_is_judged_in_bytes_and_in_files() -> None:
    assert list(judge_room(8 * GIB, 1 << 20, "here")) == []
    assert only(judge_room(50 << 20, None, "here")).verdict == "bad"
    assert "room for 500 more files" in only(judge_room(8 * GIB, 500, "here")).text


def test_a_clock_that_nobody_keeps_matters_with_several_machines() -> None:
    assert judge_clock(False, 16.0, nodes=1).verdict == "good"
    assert judge_clock(False, 16.0, nodes=2).verdict == "warning"
    assert judge_clock(True, 0.01, nodes=2).verdict == "good"


SETTINGS = """\
Configuration data as of 2026-11-30T10:00:00
ClusterName             = big
GresTypes               = gpu
JobRequeue              = 1
KillOnBadExit           = 1
KillWait                = 30 sec
MpiDefault              = none
ProctrackType           = proctrack/cgroup
SLURM_VERSION           = 24.05.4
TaskPlugin              = task/cgroup,task/affinity

Cgroup Support Configuration:
ConstrainDevices        = {}
"""
PARTITIONS = "PartitionName=a GraceTime=120 PreemptMode=REQUEUE\nPartitionName=b GraceTime=0 PreemptMode=CANCEL\n"


def test_settings_of_slurm_that_suit_are_one_good_line() -> None:
    settings = read_settings(SETTINGS.format("yes"))
    finding = only(judge_settings(settings, read_partitions(PARTITIONS, "a")))
    assert finding.text == "24.05.4, cluster big"
    preempted = only(judge_settings(settings, read_partitions(PARTITIONS, None)))
    assert "partition b is preempted without time to save" in preempted.text
    devices = only(judge_settings(read_settings(SETTINGS.format("no")), {}))
    assert "ConstrainDevices=no" in devices.text


def test_a_cgroup_that_is_really_too_small_is_named(tmp_path: Path) -> None:
    mount = Path("/sys/fs/cgroup/memory")
    own = mount / f"allstep-doctor-{os.getpid()}"
    try:
        own.mkdir()
        (own / "memory.limit_in_bytes").write_text(str(GIB // 2))
    except OSError as error:
        pytest.skip(f"no cgroup of version 1 can be made here: {error}")
    try:
        root = files(tmp_path, {"proc/self/cgroup": f"4:memory:/{own.name}\n"})
        (root / "sys/fs").mkdir(parents=True)
        (root / "sys/fs/cgroup").symlink_to("/sys/fs/cgroup")
        finding = only(check_memory(Host({}, tmp_path, workers=1, root=root)))
    finally:
        own.rmdir()
    assert finding.verdict == "bad"
    assert "512 MiB of the machine's" in finding.text
