"""A real Grid Engine over hosts of this machine, in a folder of its own, for tests.

Contract: `ensure_installed` returns once Grid Engine is here, installing Debian's packages where the environment allows
that. `Grid` is entered to start `sge_qmaster` on the first host and `sge_execd` on each, and left to end exactly those.
Everything that it writes is under its folder, and its ports are those of network namespaces, so that it meets no other
Grid Engine. There is one queue, `all.q`, and one parallel environment, `mpi`, with two slots on each host. It starts in
a few seconds. What can go wrong: programs are missing (`ProgramsUnavailable`), or a daemon does not come up
(`RuntimeError` with what it said).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from tests.hosts.bridged import BridgedHosts
from tests.jobs.processes import await_condition
from tests.jobs.programs import SYSTEM_PATH, ensure_programs

PROGRAMS = ("sge_qmaster", "sge_execd", "qsub", "qconf")
PACKAGES = ("gridengine-master", "gridengine-exec", "gridengine-client")
LIBRARY = Path("/usr/lib/gridengine")
SHARED = Path("/usr/share/gridengine")
DEBIANS_ROOT = Path("/var/lib/gridengine")
SLOTS = 2
NOTICE_S = 20

BOOTSTRAP = """\
admin_user none
default_domain none
ignore_fqdn true
spooling_method classic
spooling_lib libspoolc
spooling_params {spooling}
binary_path {library}
qmaster_spool_dir {spool}/qmaster
security_mode none
listener_threads 2
worker_threads 2
scheduler_threads 1
"""
PARALLEL_ENVIRONMENT = f"""\
pe_name mpi
slots 999
user_lists NONE
xuser_lists NONE
start_proc_args NONE
stop_proc_args NONE
allocation_rule {SLOTS}
control_slaves TRUE
job_is_first_task FALSE
urgency_slots min
accounting_summary TRUE
qsort_args NONE
"""
QUEUE = f"""\
qname all.q
hostlist {{hosts}}
seq_no 0
load_thresholds NONE
suspend_thresholds NONE
nsuspend 1
suspend_interval 00:05:00
priority 0
min_cpu_interval 00:05:00
processors UNDEFINED
qtype BATCH INTERACTIVE
ckpt_list NONE
pe_list mpi
rerun FALSE
slots {SLOTS}
tmpdir {{temporary}}
shell /bin/bash
prolog NONE
epilog NONE
shell_start_mode unix_behavior
starter_method NONE
suspend_method NONE
resume_method NONE
terminate_method NONE
notify 00:00:{NOTICE_S}
owner_list NONE
user_lists NONE
xuser_lists NONE
subordinate_list NONE
complex_values NONE
projects NONE
xprojects NONE
calendar NONE
initial_state default
s_rt INFINITY
h_rt INFINITY
s_cpu INFINITY
h_cpu INFINITY
s_fsize INFINITY
h_fsize INFINITY
s_data INFINITY
h_data INFINITY
s_stack INFINITY
h_stack INFINITY
s_core INFINITY
h_core INFINITY
s_rss INFINITY
h_rss INFINITY
s_vmem INFINITY
h_vmem INFINITY
"""


def ensure_installed(environ: Mapping[str, str]) -> None:
    """Return once Grid Engine is here; raise ProgramsUnavailable where it is missing and may not be installed."""
    ensure_programs(PROGRAMS, PACKAGES, environ)


class Grid:
    """`with Grid(folder, hosts) as grid: grid.submit("-pe", "mpi", "4", script)`."""

    def __init__(self, folder: Path, hosts: BridgedHosts) -> None:
        self.folder = folder
        self.hosts = hosts
        self._root, self._spool = folder / "root", folder / "spool"
        self._cell = self._root / "default" / "common"
        self._daemons = ExitStack()

    def run(self, *command: str | Path, env: Mapping[str, str] | None = None, host: int = 0) -> str:
        """What a command on a host says, whatever its exit code."""
        return self._done(command, env, host).stdout

    def submit(self, *arguments: str | Path, env: Mapping[str, str] | None = None, folder: Path) -> str:
        """Submit a job that works in `folder`; its number."""
        done = self._done(("qsub", "-terse", *arguments), env, 0, folder)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def is_there(self, job: str) -> bool:
        """Whether the job waits or runs."""
        return self._done(("qstat", "-j", job)).returncode == 0

    def account(self, job: str) -> list[dict[str, str]]:
        """What is kept of each start of a job that has ended, the first one first."""
        text = self.run("qacct", "-j", job)
        starts = [part for part in text.split("=" * 62) if part.strip()]
        return [
            dict(line.split(None, 1) for line in part.splitlines() if len(line.split(None, 1)) == 2) for part in starts
        ]

    def __enter__(self) -> Grid:
        with ExitStack() as daemons:
            self._prepare()
            daemons.enter_context(self._daemon("sge_qmaster", 0))
            self._await(lambda: self._done(("qconf", "-sm")).returncode == 0)
            for index, host in enumerate(self.hosts.names):
                self.run("qconf", "-ah", host)
                self.run("qconf", "-as", host)
                # A job's processes are known by a group of their own, and these hosts see each other's processes.
                local = self.folder / "local" / host
                local.parent.mkdir(exist_ok=True)
                local.write_text(f"gid_range {70000 + 1000 * index}-{70099 + 1000 * index}\n")
                self._must("qconf", "-Aconf", local)
            for index in range(len(self.hosts.names)):
                daemons.enter_context(self._daemon("sge_execd", index))
            self._await(lambda: set(self.hosts.names) <= set(self.run("qconf", "-sel").split()))
            self._configure()
            self._await(lambda: self.run("qstat", "-f").count("lx-amd64") == len(self.hosts.names))
            self._daemons = daemons.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._daemons:
            self.run("qdel", "-f", "-u", "*")

    def environ(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment in which a command reaches this Grid Engine."""
        here = {
            "SGE_ROOT": str(self._root),
            "SGE_CELL": "default",
            "SGE_QMASTER_PORT": "6444",
            "SGE_EXECD_PORT": "6445",
        }
        return {"PATH": SYSTEM_PATH, "HOME": os.environ.get("HOME", "/"), "SGE_ND": "1"} | here | dict(env or {})

    def _done(
        self,
        command: tuple[str | Path, ...],
        env: Mapping[str, str] | None = None,
        host: int = 0,
        folder: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        argv = [*self.hosts.inside(host), *map(str, command)]
        return subprocess.run(
            argv, env=self.environ(env), cwd=folder or self.folder, capture_output=True, text=True, timeout=60
        )

    @contextmanager
    def _daemon(self, name: str, host: int) -> Iterator[None]:
        """Run a daemon as our child; the kernel ends it should this process die first."""
        argv = ["setpriv", "--pdeathsig", "TERM", *self.hosts.inside(host), name]
        with (self.folder / f"{name}-{host}.out").open("w") as out:
            process = subprocess.Popen(argv, env=self.environ(), stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _prepare(self) -> None:
        for path in (self._cell, self._spool / "qmaster", self._spool / "execd"):
            path.mkdir(parents=True)
        for part in ("bin", "lib", "util", "utilbin"):
            (self._root / part).symlink_to(DEBIANS_ROOT / part)
        spooling = f"{self._cell};{self._spool}/qmaster"
        (self._cell / "act_qmaster").write_text(f"{self.hosts.names[0]}\n")
        (self._cell / "bootstrap").write_text(BOOTSTRAP.format(spooling=spooling, library=LIBRARY, spool=self._spool))
        ours = {
            "execd_spool_dir": f"{self._spool}/execd",
            "min_uid": "0",
            "min_gid": "0",
            "load_report_time": "00:00:01",
        }
        ours |= {"reporting_params": "accounting=true reporting=false flush_time=00:00:01 joblog=false"}
        default = (SHARED / "default-configuration").read_text()
        pairs = [line.split(None, 1) for line in default.splitlines() if line.strip() and not line.startswith("#")]
        configuration = self.folder / "configuration"
        configuration.write_text("".join(f"{name} {ours.get(name, value)}\n" for name, value in pairs))
        self._must(LIBRARY / "spoolinit", "classic", "libspoolc", spooling, "init")
        self._must(LIBRARY / "spooldefaults", "configuration", configuration)
        for part, resource in (("complexes", "centry"), ("usersets", "usersets")):
            self._must(LIBRARY / "spooldefaults", part, SHARED / "util" / "resources" / resource)
        self._must(LIBRARY / "spooldefaults", "managers", "root")

    def _configure(self) -> None:
        """Add the parallel environment and the queue, and have the scheduler act at once."""
        # Where hosts keep a job's temporary files goes by its number, and these hosts have one disk.
        own = {host: self._spool / f"tmp-{host}" for host in self.hosts.names}
        for path in own.values():
            path.mkdir()
        temporary = ",".join(["/tmp", *(f"[{host}={path}]" for host, path in own.items())])
        scheduler = self.run("qconf", "-ssconf")
        for name in ("flush_submit_sec", "flush_finish_sec"):
            scheduler = scheduler.replace(f"{name}                  0", f"{name}                  1")
        scheduler = scheduler.replace(
            "schedule_interval                 0:0:15", "schedule_interval                 0:0:1"
        )
        texts = {
            "-Ap": PARALLEL_ENVIRONMENT,
            "-Aq": QUEUE.format(hosts=" ".join(self.hosts.names), temporary=temporary),
            "-Msconf": scheduler,
        }
        for option, text in texts.items():
            file = self.folder / f"qconf{option}"
            file.write_text(text)
            self._must("qconf", option, file)

    def _must(self, *command: str | Path) -> None:
        done = self._done(command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} failed: {done.stdout}{done.stderr}")

    def _await(self, condition: Callable[[], bool]) -> None:
        try:
            await_condition(condition, limit=60.0)
        except AssertionError as error:
            said = [f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.out"))]
            said += [path.read_text()[-2000:] for path in self._spool.rglob("messages")]
            raise RuntimeError("Grid Engine does not come up:\n" + "\n".join(said)) from error
