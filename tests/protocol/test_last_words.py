"""What recorded ends of processes say: texts of torch, NCCL, CUDA and gloo, with all that stands around them.

Stand-in: no GPU is asked. The texts have the form that torch 2.4 to 2.13 and NCCL 2.20 to 2.28 write, as their sources
and reports of users show.
"""

from __future__ import annotations

import signal

import pytest
import torch
import torch.distributed as dist

from allstep.protocol.last_words import about_another_rank, after_another
from allstep.protocol.worker_exit import WorkerExit


def frames(count: int) -> str:
    return "".join(f"frame #{at}: c10::Error::Error(...) + 0x{at:x} (0x7f in libc10.so)\n" for at in range(count))


TIMEOUT = (
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=57, OpType=ALLREDUCE, NumelIn=8, "
    "NumelOut=8, Timeout(ms)=600000) ran for 600043 milliseconds before timing out."
)
ASSERT = (
    "CUDA error: device-side assert triggered\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
REMOTE = (
    "NCCL error: remote process exited or there was a network error, NCCL version 2.27.3\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\nsocketProgressOpt: Call to recv from 10.0.0.2<33759> failed : Connection reset by peer\n"
)
STACKS = "Fatal Python error: Aborted\n\n" + "".join(
    f'Thread 0x{at:016x} (most recent call first):\n  File "/x/threading.py", line 320 in wait\n\n' for at in range(40)
)
DUMP_FAILED = (
    '[rank1]:[W1128 10:00:00.0 ProcessGroupNCCL.cpp:1783] [PG ID 0 PG GUID 0 Rank 1] Failed to check the "should dump" '
    "flag on TCPStore, (maybe TCPStore server has shut down too early), with error: Broken pipe\n"
)


def watchdog(reason: str) -> str:
    """What NCCL's watchdog writes before and while it aborts the process."""
    told = f"[PG ID 0 PG GUID 0(default_pg) Rank 1] Process group watchdog thread terminated with exception: {reason}\n"
    raised = "Exception raised from run at /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:2068\n"
    return (
        f"[rank1]:[E1128 10:00:00.0 ProcessGroupNCCL.cpp:2068] {told}{raised}{frames(9)}\n"
        "terminate called after throwing an instance of 'c10::DistBackendError'\n"
        f"  what():  {told}{raised}{frames(30)}\n"
    )


def traceback(*errors: str, prefix: str = "[rank1]: ") -> str:
    lines: list[str] = []
    for at, error in enumerate(errors):
        if at:
            lines += ["", "During handling of the above exception, another exception occurred:", ""]
        lines += ["Traceback (most recent call last):", '  File "train.py", line 9, in <module>', "    step()"]
        lines += error.rstrip().splitlines()
    return "".join(f"{prefix}{line}\n" for line in lines)


CAUGHT = "CUDA out of memory at a batch size of 64, trying 32\nConnection reset by peer, downloading again\n"
NOISE = "".join(f"epoch 1: {at}/900 loss 0.3\n" for at in range(20))

PEERS = {
    "NCCL's watchdog gave up a collective": (-signal.SIGABRT, watchdog(TIMEOUT)),
    "the same behind faulthandler's stacks": (-signal.SIGABRT, NOISE + watchdog(TIMEOUT) + STACKS),
    "the same after an error that was caught": (-signal.SIGABRT, CAUGHT + NOISE + watchdog(TIMEOUT) + STACKS),
    "NCCL saw the peer's process end": (-signal.SIGABRT, watchdog(REMOTE) + STACKS),
    "NCCL's internal error over a closed connection": (
        -signal.SIGABRT,
        watchdog("NCCL error: internal error\nLast error:\nNet : Connection closed by remote peer n1<47861>"),
    ),
    "InfiniBand lost the peer": (
        -signal.SIGABRT,
        watchdog("NCCL error: remote error\nLast error:\nNET/IB: Got completion from peer 10.0.0.2<4> with status=12"),
    ),
    "NCCL's heartbeat monitor": (
        -signal.SIGABRT,
        "[rank1]:[F1128 10:00:00.0 ProcessGroupNCCL.cpp:1557] [PG ID 0 PG GUID 0 Rank 1] ProcessGroupNCCL's watchdog "
        f"got stuck for 480 seconds without making progress in monitoring enqueued collectives.\n{STACKS}",
    ),
    "gloo's exception left a thread": (
        -signal.SIGABRT,
        "terminate called after throwing an instance of 'gloo::IoException'\n"
        f"  what():  [pair.cc:534] Connection closed by peer [10.0.0.2]:3456\n{STACKS}",
    ),
    "torch's exception with C++ frames": (
        1,
        traceback(
            f"torch.distributed.DistBackendError: {REMOTE}Exception raised from checkForNCCLErrors\n{frames(40)}"
        ),
    ),
    "the store's server is gone": (
        1,
        traceback(
            "torch.distributed.DistStoreError: wait timeout after 600000ms, keys: /group/0\n"
            f"Exception raised from doWait at /pytorch/TCPStore.cpp:603\n{frames(25)}"
        )
        + DUMP_FAILED,
    ),
    "an abort of NCCL as an exception": (
        1,
        traceback(
            "torch.distributed.DistBackendError: NCCL communicator was aborted on rank 1. Original reason for failure "
            f"was: {TIMEOUT}"
        ),
    ),
}

OWN = {
    "a device-side assertion, by the watchdog": (-signal.SIGABRT, watchdog(ASSERT) + STACKS),
    "a device-side assertion, as an exception": (1, traceback(f"torch.AcceleratorError: {ASSERT}") + DUMP_FAILED),
    "both": (-signal.SIGABRT, traceback(f"torch.AcceleratorError: {ASSERT}") + watchdog(ASSERT) + STACKS),
    "out of memory inside NCCL": (
        1,
        traceback(
            "torch.distributed.DistBackendError: NCCL error in: /pytorch/NCCLUtils.cpp:94, unhandled cuda error\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
        ),
    ),
    "out of memory": (1, traceback("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "a GPU that is gone": (
        -signal.SIGABRT,
        watchdog("CUDA error: unspecified launch failure\nNVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."),
    ),
    "a device error, and clean-up that finds the peers gone": (
        1,
        traceback(f"torch.AcceleratorError: {ASSERT}", f"torch.distributed.DistBackendError: {REMOTE}"),
    ),
    "two ranks on one GPU": (
        1,
        traceback(
            "torch.distributed.DistBackendError: NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)\n"
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 50000"
        ),
    ),
    "an error of the script after a download that was retried": (
        1,
        "Connection reset by peer, downloading again\n" + traceback("ValueError: labels and logits differ in length"),
    ),
    "a worker of a DataLoader that aborted": (
        1,
        "terminate called after throwing an instance of 'c10::DistBackendError'\n"
        + traceback("RuntimeError: DataLoader worker (pid 7) is killed by signal: Aborted."),
    ),
    "an abort without words of a peer": (-signal.SIGABRT, "free(): invalid pointer\n" + STACKS),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_victims_last_words_are_about_its_peer(name):
    returncode, output = PEERS[name]
    assert after_another(WorkerExit(1, returncode, stderr=output))


@pytest.mark.parametrize("name", OWN)
def test_last_words_about_the_own_device_are_no_victims(name):
    returncode, output = OWN[name]
    assert not after_another(WorkerExit(1, returncode, stderr=output))


@pytest.mark.parametrize("returncode", [0, -signal.SIGKILL, -signal.SIGSEGV])
def test_a_crash_is_no_end_because_of_another_whatever_was_written(returncode):
    assert not after_another(WorkerExit(1, returncode, stderr=watchdog(TIMEOUT)))


class NoText:
    def __str__(self) -> str:
        raise TypeError("no text")


@pytest.mark.parametrize(
    ("error", "derived"),
    [
        (RuntimeError(NoText()), False),
        (RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:3456"), True),
        (RuntimeError("[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError(f"Connection reset by peer\nException raised from recvBytes\n{frames(30)}"), True),
        (dist.DistBackendError(REMOTE), True),
        (dist.DistBackendError(f"NCCL communicator was aborted on rank 1. {TIMEOUT}"), True),
        (dist.DistBackendError("ncclUnhandledCudaError: ...\nLast error:\nCuda failure 2 'out of memory'"), False),
        (dist.DistBackendError(f"NCCL error: {ASSERT}"), False),
        (torch.AcceleratorError(ASSERT), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # somebody's download
        (ValueError("connection closed"), False),
        (RuntimeError("Caught X in DataLoader worker process 0.\nOriginal Traceback ...\nX: broken pipe"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), False),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (MemoryError(), False),
        (FloatingPointError("Function 'MulBackward0' returned nan values in its 0th output."), False),
    ],
)
def test_an_exception_about_another_rank_is_known_by_its_kind(error, derived):
    assert about_another_rank(error) is derived
