"""What an exception or a process's last text says of why it ended: pure functions.

A process whose peer is gone fails too, because its connections break and its collectives run out of time. Such an end
is *derived*. It is told by what was raised, or by what the process wrote to standard error, which is all there is to go
by for scripts that report nothing over the channel.

Only the words about the end itself are read, wherever in the output they stand:
- of a process that was aborted, from the last "terminate called" or fatal log line on;
- of one that an exception ended, the last traceback with those that led to it;
- else the last lines.
C++ frames, source lines, what libraries log and the stacks that faulthandler writes are left out: an abort of NCCL's
watchdog has a hundred of them behind its words.

A text about this process's own device or memory outweighs one about a peer. NCCL's watchdog aborts a process both for a
peer that did not come and for an error of the device, and names the reason in the same sentence. An Xid of NVIDIA's
driver is known where a process repeats it. The kernel's log, where the driver writes it, is not read.
"""

from __future__ import annotations

import re
import signal

from allstep.protocol.worker_exit import WorkerExit

# What gloo, NCCL, torch's store and Python's sockets say when the process at the other end is gone or does not answer.
_ABOUT_A_PEER = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken ?pipe|connection(reset|refused|aborted)error"
    r"|software caused connection abort|socket (closed|timeout)|sendbytes failed|recvbytes failed|recvvalue failed"
    r"|failed to recv|dist(backend|network|store)error|nccl ?remote ?error|remote process (has )?(exited|terminated)"
    r"|process ?group ?watchdog|heartbeat ?monitor|watchdog got stuck|(read|write) error .*peer|completion from peer"
    r"|timeout caused pair closure|communicator was aborted|timed out waiting \d+ ?ms for (recv|send)"
    r"|collective (operation )?timeout",
    re.IGNORECASE,
)

# What CUDA, NCCL, cuBLAS and the driver say of this process's own device, memory or call.
_OF_ITS_OWN = re.compile(
    r"cuda (runtime )?(error|failure)|hip error|device-side assert|out of memory|can't allocate memory"
    r"|illegal memory access|\becc error|nvlink error|fallen off the bus|\bxid \(pci|c(ublas|udnn|usparse)_status_"
    r"|nccl ?invalid ?(usage|argument)|invalid usage|duplicate gpu",
    re.IGNORECASE,
)

_TORCHS = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")

_TORCHS_PREFIX = re.compile(r"^\[rank\d+\]: ?")  # before each line of a traceback once a process group exists
_LOGGED = re.compile(r"^(\[rank\d+\]: ?)?\[[IWE]\d* ")  # a line of torch's C++ log
_FATAL = re.compile(r"^(\[rank\d+\]: ?)?\[F\d* ")
_NOT_WORDS = re.compile(r"frame #\d+:|Exception raised from |    |  File \"")
_TRACEBACK = "Traceback (most recent call last)"
_LED_TO = re.compile(
    r"(\[rank\d+\]: ?)?(During handling of the above exception|The above exception was the direct cause)"
)
_STACKS = "Fatal Python error"
_LAST = 12


def without_torchs_prefix(line: str) -> str:
    """A line of output as the script wrote it."""
    return _TORCHS_PREFIX.sub("", line)


def about_another_rank(error: BaseException) -> bool:
    """Whether an exception is most likely about the end of another rank: what torch raises for a broken collective.

    torch's own types say so; a plain RuntimeError does by its text. Other types are about connections of the script's
    own, and so is what a worker of a DataLoader raised, whose text torch begins with "Caught".
    """
    is_torchs = type(error).__module__.startswith("torch") and type(error).__name__ in _TORCHS
    if not is_torchs and type(error) is not RuntimeError:
        return False
    try:
        text = str(error)
    except Exception:  # it was given something that has no text
        return is_torchs
    words = _without_frames(text.splitlines())
    if is_torchs:
        return not _says(_OF_ITS_OWN, words)
    return not text.startswith("Caught ") and _blames_a_peer(words[-_LAST:])


def after_another(end: WorkerExit) -> bool:
    """Whether a worker most likely ended because another had: its last words are about a peer."""
    aborted = end.returncode == -signal.SIGABRT  # how a communication library ends a process whose peer is gone
    return (end.returncode > 0 or aborted) and about_a_peer(end.stderr)


def about_a_peer(output: str) -> bool:
    """Whether the words about its end, in the text that a process wrote last, are about another process."""
    return _blames_a_peer(_words_of_its_end(output))


def _blames_a_peer(words: list[str]) -> bool:
    return _says(_ABOUT_A_PEER, words) and not _says(_OF_ITS_OWN, words)


def _says(what: re.Pattern[str], words: list[str]) -> bool:
    return what.search("\n".join(words)) is not None


def _words_of_its_end(output: str) -> list[str]:
    lines = output.rstrip().splitlines()
    # Behind this line faulthandler writes the stacks of all threads.
    stacks = [at for at, line in enumerate(lines) if line.startswith(_STACKS)]
    lines = lines[: stacks[-1]] if stacks else lines
    aborts = [at for at, line in enumerate(lines) if line.startswith("terminate called") or _FATAL.match(line)]
    start = _traceback_start(lines)
    # An abort before the traceback was that of a child, such as a worker of a DataLoader.
    if aborts and (start is None or aborts[-1] > start):
        return _without_frames(lines[aborts[-1] :])
    words = [without_torchs_prefix(line) for line in lines[start:] if not _LOGGED.match(line)]
    return _without_frames(words) if start is not None else _without_frames(words)[-_LAST:]


def _traceback_start(lines: list[str]) -> int | None:
    """Where the last traceback begins, with those that led to it."""
    starts = [at for at, line in enumerate(lines) if _TRACEBACK in line]
    if not starts:
        return None
    while len(starts) > 1 and any(_LED_TO.match(line) for line in lines[starts[-2] : starts[-1]]):
        starts.pop()
    return starts[-1]


def _without_frames(lines: list[str]) -> list[str]:
    return [line for line in lines if line.strip() and not _NOT_WORDS.match(line)]
