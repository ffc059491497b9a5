"""How a worker's process ended, as a value, and what its end says: pure functions.

A process whose peer is gone fails too, because its connections break. `after_another` tells such an end by what the
process last wrote to standard error; it is all there is to go by for scripts that report nothing over the channel.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

# What gloo, NCCL, torch's store and Python's sockets say when the process at the other end is gone or does not answer.
_CONNECTION_LOST = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken ?pipe|connection(reset|refused|aborted)error"
    r"|socket (closed|timeout)|sendbytes failed|recvbytes failed|recvvalue failed|failed to recv"
    r"|dist(backend|network|store)error|ncclremoteerror|remote process (has )?(exited|terminated)"
    r"|process ?group ?watchdog|heartbeat monitor|(read|write) error .*peer|timeout caused pair closure"
    r"|communicator was aborted|timed out waiting \d+ ?ms for (recv|send)|collective operation timeout",
    re.IGNORECASE,
)

_TORCHS = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """The end of one worker.

    `returncode` is as subprocess gives it (-N: killed by signal N), `killed` true where the supervisor's SIGKILL ended
    it, `stderr` the last text that it wrote to standard error, and `note` a sentence that the supervisor can add, such
    as that memory ran out.
    """

    rank: int
    returncode: int
    killed: bool = False
    stderr: str = ""
    note: str = ""


def exit_status(returncode: int) -> int:
    """Return the status that a shell would show: 128 + N for a death by signal N."""
    return returncode if returncode >= 0 else 128 - returncode


def describe(returncode: int) -> str:
    """Say in words how a process ended."""
    if returncode >= 0:
        return f"exit code {returncode}"
    return f"killed by {signal_name(-returncode)} (exit code {exit_status(returncode)})"


def signal_name(number: int) -> str:
    """The name of a signal, also of one that has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def about_a_lost_connection(text: str) -> bool:
    """Whether the last lines of a text are about a connection that another process let go."""
    # An exception's last lines say what it is; further up, a script may have printed the like about a download.
    return _CONNECTION_LOST.search("\n".join(text.rstrip().splitlines()[-12:])) is not None


def about_another_rank(error: BaseException) -> bool:
    """Whether an exception is most likely about the end of another rank: what torch raises for a broken collective.

    torch's own types say so; a plain RuntimeError does by its text. Other types are about connections of the script's
    own, and so is what a worker of a DataLoader raised, whose text torch begins with "Caught".
    """
    if type(error).__module__.startswith("torch") and type(error).__name__ in _TORCHS:
        return True
    if type(error) is not RuntimeError:
        return False
    try:
        text = str(error)
    except Exception:  # it was given something that has no text
        return False
    return not text.startswith("Caught ") and about_a_lost_connection(text)


def after_another(end: WorkerExit) -> bool:
    """Whether a worker most likely ended because another had: its last words are about a lost connection."""
    aborted = end.returncode == -signal.SIGABRT  # how a communication library ends a process whose peer is gone
    return (end.returncode > 0 or aborted) and about_a_lost_connection(end.stderr)
