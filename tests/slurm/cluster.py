"""A real SLURM cluster of virtual nodes on this machine, in a folder of its own, for tests.

Contract: `ensure_installed` returns once SLURM is here, installing it where the environment allows that; `Cluster` is
entered to start `munged`, `slurmctld` and one `slurmd` a node, and left to end exactly those. A test may end one of
them (`stop`, `kill`) and start it again (`start`), by the names "slurmctld" and "slurmd-n1". What it writes (keys,
sockets, state, logs) is under its folder and its ports were free, so the clusters of several pytest-xdist workers and
a SLURM that the machine already has do not meet. Nor do their jobs, whose ports follow from their numbers: these begin
with one made from the controller's port, or with `first_job`. Starting takes about a second. What can go wrong: SLURM
is missing (`ProgramsUnavailable`), or a daemon does not come up (`RuntimeError` with the ends of the logs).

The nodes are named n1, n2, ..., all at 127.0.0.1: no resolver knows those names, so MASTER_ADDR=127.0.0.1 is set for
every command. As root each node also has fake GPUs (clones of the null device), for CUDA_VISIBLE_DEVICES: four, or as
many as `gpus` says of each.
"""

from __future__ import annotations

import getpass
import os
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import pytest

from tests.jobs.ports import free_port
from tests.jobs.programs import SYSTEM_PATH, ensure_programs

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "sinfo", "squeue")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
START_SECONDS = 30.0
GPUS = 4
Completed = subprocess.CompletedProcess[str]
RANK_PREFIXES = (
    *("SLURM", "SRUN_", "SBATCH_", "SALLOC_", "ALLSTEP_RUN_ID", "ALLSTEP_ATTEMPT", "TORCHELASTIC_", "OMPI_", "PMI"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_"),
)


def ensure_installed(environ: Mapping[str, str]) -> None:
    """Return once SLURM is here; raise ProgramsUnavailable where it is missing and may not be installed."""
    ensure_programs(PROGRAMS, PACKAGES, environ)


class Cluster:
    """`with Cluster(folder, nodes=2) as cluster: cluster.srun("-N2", "hostname")`."""

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        cpus: int = 8,
        configuration: str = "",
        proctrack: str = "linuxproc",
        gpus: tuple[int, ...] = (),
        first_job: int | None = None,
    ) -> None:
        self.folder = folder
        self._gpus = gpus or (GPUS,) * nodes
        self._proctrack = proctrack
        self._first_job = first_job
        self.nodes = tuple(f"n{index}" for index in range(1, nodes + 1))
        self._cpus = cpus
        self._configuration = configuration
        self._daemons = ExitStack()
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def srun(self, *args: str, env: Mapping[str, str] | None = None, timeout: float = 60.0) -> Completed:
        """Run `srun --mpi=none ARGS` and return what it printed, whatever its exit code.

        Args:
            args: srun's options, the program and its arguments.
            env: variables to set over this process's environment (without its SLURM, torchrun and allstep variables).
            timeout: seconds; the job is cancelled and subprocess.TimeoutExpired raised after that.
        """
        return self.run("srun", "--mpi=none", *args, env=env, timeout=timeout)

    def sbatch(
        self, script: str, *options: str, env: Mapping[str, str] | None = None, timeout: float = 60.0
    ) -> Completed:
        """Submit a batch script, wait for its end, and return its output and exit code.

        Args:
            script: the script's text, with its `#!` line.
            options: sbatch's options.
            env: as for `srun`.
            timeout: seconds; the job is cancelled and subprocess.TimeoutExpired raised after that.
        """
        name = secrets.token_hex(4)
        path = self.folder / f"job-{name}.sh"
        path.write_text(script)
        out, err = path.with_suffix(".out"), path.with_suffix(".err")
        files = ("--output", str(out), "--error", str(err))
        done = self.run("sbatch", "--wait", "--parsable", *files, *options, str(path), env=env, timeout=timeout)
        if not out.exists():
            raise RuntimeError(f"sbatch did not start the script: {done.stderr}{self._logs()}")
        return Completed(done.args, done.returncode, out.read_text(), err.read_text())

    def run(self, *command: str, env: Mapping[str, str] | None = None, timeout: float = 60.0) -> Completed:
        """Run any of SLURM's commands against this cluster, from a clean environment with `env` set over it."""
        try:
            return subprocess.run(
                command, env=self.environ(env), cwd=self.folder, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            self.cancel_jobs()
            raise

    def environ(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's environment for talking to the cluster, without what says that it is itself a rank."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(RANK_PREFIXES)}
        ours |= {"PATH": SYSTEM_PATH, "SLURM_CONF": str(self.folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}
        return ours | dict(env or {})

    def cancel_jobs(self) -> None:
        """Cancel every job and return when the queue is empty."""
        self._ask("scancel", f"--user={getpass.getuser()}")
        _wait_until(lambda: not self._ask("squeue", "--noheader"), "the queue to be empty", self._logs)

    def stop(self, name: str) -> None:
        """End a daemon in order, and return when it has ended."""
        process = self._running.pop(name)
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self, name: str) -> None:
        """End a daemon by SIGKILL; the steps that it has started run on."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def start(self, name: str) -> None:
        """Start a daemon that does not run; the controller goes on from its state."""
        conf = str(self.folder / "slurm.conf")
        if name == "slurmctld":
            command = ["slurmctld", "-D", "-f", conf]
        elif name == "munged":
            munge = self.folder / "munge"
            command = ["munged", "--foreground", "--force", f"--key-file={munge / 'key'}"]
            command += [f"--{each}-file={munge / each}" for each in ("pid", "log", "seed")]
            command += [f"--socket={munge / 'socket'}"]
        else:
            command = ["slurmd", "-D", "-f", conf, "-N", name.removeprefix("slurmd-")]
        program = shutil.which(command[0], path=SYSTEM_PATH)
        # The kernel ends it should this process die first.
        setpriv = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        with (self.folder / "log" / f"{name}.out").open("a") as out:
            self._running[name] = subprocess.Popen(
                [*setpriv, str(program), *command[1:]],
                env=self.environ(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def until_idle(self) -> None:
        """Return when every node can take jobs and has none."""
        _wait_until(self._all_idle, "all nodes to be idle", self._logs)

    def __enter__(self) -> Cluster:
        with ExitStack() as daemons:
            self._prepare()
            daemons.callback(self._stop_all)
            self.start("munged")
            _wait_until((self.folder / "munge" / "socket").exists, "munged's socket", self._logs)
            self.start("slurmctld")
            for node in self.nodes:
                self.start(f"slurmd-{node}")
            self.until_idle()
            self._daemons = daemons.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._daemons:
            self.cancel_jobs()

    def _stop_all(self) -> None:
        for name in reversed(list(self._running)):
            self.stop(name)

    def _prepare(self) -> None:
        for part in ("state", "log", "dev", "run", "munge", *(f"run/spool.{node}" for node in self.nodes)):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        fake_gpus = os.geteuid() == 0
        if fake_gpus:
            for index in range(max(self._gpus)):
                os.mknod(self.folder / "dev" / f"fakegpu{index}", 0o20666, os.makedev(1, 3))
            (self.folder / "gres.conf").write_text(
                "".join(
                    f"NodeName={node} Name=gpu File={self.folder}/dev/fakegpu[0-{count - 1}] Flags=nvidia_gpu_env\n"
                    for node, count in zip(self.nodes, self._gpus, strict=True)
                )
            )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (self.folder / "slurm.conf").write_text(
            self._slurm_conf([free_port() for _ in range(1 + len(self.nodes))], fake_gpus)
        )

    def _slurm_conf(self, ports: list[int], fake_gpus: bool) -> str:
        host, here = platform.node().partition(".")[0], self.folder
        gres = [f" Gres=gpu:{count}" if fake_gpus else "" for count in self._gpus]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            f" CPUs={self._cpus} RealMemory=4000{its_gpus} State=UNKNOWN"
            for node, port, its_gpus in zip(self.nodes, ports[1:], gres, strict=True)
        )
        return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={self._first_job or 10 * ports[0]}
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
AuthInfo=cred_expire=10,socket={here}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/run/spool.%n
SlurmctldPidFile={here}/run/slurmctld.pid
SlurmdPidFile={here}/run/slurmd.%n.pid
SlurmctldLogFile={here}/log/slurmctld.log
SlurmdLogFile={here}/log/slurmd.%n.log
ProctrackType=proctrack/{self._proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
JobRequeue=1
{"GresTypes=gpu" if fake_gpus else ""}
{self._configuration}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

    def _all_idle(self) -> bool:
        return set(self._ask("sinfo", "--noheader", "--Node", "--format=%T").split()) == {"idle"}

    def _ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.environ(), capture_output=True, text=True, timeout=START_SECONDS).stdout

    def _logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted((self.folder / "log").iterdir())
        )


def cgroup_cluster(folder: Path, nodes: int) -> Cluster:
    """A cluster whose steps are in cgroups, so that nothing on a node outlives the last task; skips where none can be.

    Args:
        folder: as of `Cluster`.
        nodes: how many.
    """
    if os.geteuid() != 0 or not os.access("/sys/fs/cgroup/freezer", os.W_OK):
        pytest.skip("cgroups of SLURM's kind take root and the freezer of cgroup v1")
    return Cluster(folder, nodes, proctrack="cgroup")


def _wait_until(condition: Callable[[], bool], what: str, logs: Callable[[], str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {START_SECONDS:.0f} s for {what}; the daemons' logs end with:\n{logs()}")
        time.sleep(0.02)  # daemons tell nobody that they are ready
