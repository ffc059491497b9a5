"""The monitor of ranks that no supervisor started: a small process of its own, so that no rank's freezing stops it.

`start_sidecar` is called by one rank of each node. It starts `sidecar_process.py` by its path in a session of its own,
with nothing on its standard streams, and returns when the sidecar listens. The caller holds the write end of the
sidecar's `lifeline`, through which it also gives the setup, so that the key is on no command line. That end is the
first thing that closes when the caller's process ends. The sidecar ends when its lifeline has closed, no rank is
connected any more, and nothing is left to judge.

After a verdict it writes the report to its starter's standard error, of which it holds a duplicate, orders the ranks to
leave, writes `failure.json` where an attempt folder is known, and kills what stays of its node. It ignores the signals
that a scheduler sends to a whole job: it ends when the ranks have. Until then whoever reads the starter's standard
error to its end waits. The head's sidecar also keeps the run's record (`sidecar_record`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from allstep.diagnosis.hang import HangLimits
from allstep.errors import WorldError
from allstep.monitor.lifeline import Lifeline
from allstep.protocol.address import EVERYWHERE, HERE, join_address
from allstep.protocol.connection import is_ready

_PROCESS = Path(__file__).with_name("sidecar_process.py")


@dataclass(frozen=True, slots=True)
class SidecarSetup:
    """What a sidecar is told.

    Attributes:
        key: what its ranks, and relays, have to have.
        attempt: the present start's number.
        world_size: how many ranks the whole world has.
        host: where to listen, as `protocol.address.listen` takes it.
        limits: as in ALLSTEP_LIMITS.
        attempt_folder: where failure.json goes; empty: nowhere.
        upstream: HOST:PORT of the head's hub, which makes this one a relay; empty: this is the head.
        node_rank: of this node.
        ranks: of this node, for a relay.
        nodes: how many there are, for the head.
        run: the run's name, for the report.
        secrets: what is not to be in the report, nor in the run's record.
        about: what `run.json` says of the run, for the head; see `run_record.about_run`. Empty: no record is kept.
        run_folder: as `run_record.folder_of_ranks` takes it.
    """

    key: str
    attempt: int
    world_size: int
    host: str = HERE
    limits: str = ""
    attempt_folder: str = ""
    upstream: str = ""
    node_rank: int = 0
    ranks: tuple[int, ...] = ()
    nodes: int = 1
    run: str = ""
    secrets: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    run_folder: str | None = None


class Sidecar:
    """A started sidecar: the address that its ranks connect to, and its process."""

    def __init__(self, address: str, process: subprocess.Popen[bytes], lifeline: int) -> None:
        self.address = address
        self.pid = process.pid
        self._process = process
        self._lifeline = Lifeline(lifeline)

    def release(self) -> None:
        """Let it end, as soon as no rank needs it any more."""
        self._lifeline.release()


def start_sidecar(setup: SidecarSetup, timeout: float = 10.0) -> Sidecar:
    """Start a sidecar on this node.

    Args:
        setup: what it is told.
        timeout: seconds that it has to start.

    Raises:
        ConfigurationError: the limits are not as they must be.
        WorldError: it did not start.
    """
    HangLimits.parse(setup.limits)  # an error of the user's is raised here, and not said by another process
    theirs, lifeline = os.pipe()
    answer, answer_theirs = os.pipe()
    given = [theirs, answer_theirs]
    with contextlib.suppress(OSError):  # the rank may have closed its standard error
        given.append(os.dup(2))
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, lifeline)
        try:
            process = subprocess.Popen(
                # -I -S: no code of the user's or of site-packages runs in it, and it starts sooner.
                [sys.executable, "-I", "-S", str(_PROCESS.resolve()), *map(str, given)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=given,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            os.close(answer)
            raise WorldError(f"the service of this node's ranks could not be started: {error}") from error
        finally:
            for fd in given:
                os.close(fd)
        os.write(lifeline, json.dumps(asdict(setup)).encode() + b"\n")
        text = _read_answer(answer, timeout)
        port = text.removeprefix("port ")
        if not text.startswith("port "):
            process.kill()
            process.wait()
            raise WorldError(
                f"the service of this node's ranks did not start within {timeout:g} s: {text or 'no word'}"
            )
        undo.pop_all()
    return Sidecar(join_address(HERE if setup.host == EVERYWHERE else setup.host, int(port)), process, lifeline)


def _read_answer(fd: int, timeout: float) -> str:
    deadline, data = time.monotonic() + timeout, b""
    try:
        while (left := deadline - time.monotonic()) > 0 and is_ready(fd, left):
            chunk = os.read(fd, 4096)
            data += chunk
            if not chunk:
                break
    finally:
        os.close(fd)
    return data.decode(errors="replace").strip()
