"""Rank 1 ends as NCCL's watchdog ends a process that waited in vain, and then rank 0 by an error of its own.

Stand-in: what NCCL writes is written here, and the abort is Python's.
"""

import os
import sys
import time
from pathlib import Path

RAN_OUT = (
    "[PG ID 0 PG GUID 0(default_pg) Rank 1] Process group watchdog thread terminated with exception: [Rank 1] Watchdog "
    "caught collective operation timeout: WorkNCCL(SeqNum=57, OpType=ALLREDUCE, NumelIn=8, NumelOut=8, "
    "Timeout(ms)=600000) ran for 600043 milliseconds before timing out.\n"
    "Exception raised from run at /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:2068\n"
)
FRAMES = "".join(f"frame #{at}: c10::Error::Error(...) + 0x9d (0x7f1204d4e05d in libc10.so)\n" for at in range(40))

aborting = Path("aborting")
if os.environ["RANK"] == "1":
    sys.stderr.write(f"[rank1]:[E1128 10:00:00.0 ProcessGroupNCCL.cpp:2068] {RAN_OUT}{FRAMES}\n")
    sys.stderr.write(f"terminate called after throwing an instance of 'c10::DistBackendError'\n  what():  {RAN_OUT}")
    sys.stderr.write(FRAMES)
    sys.stderr.flush()
    aborting.touch()
    os.abort()  # faulthandler then writes the stacks of all threads behind it
while not aborting.exists():
    time.sleep(0.01)
time.sleep(0.5)
raise ValueError("the batch that rank 1 waited for cannot be read")
