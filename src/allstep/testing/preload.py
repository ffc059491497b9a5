"""Imported once by the server that ranks are forked from, so that no rank pays for importing torch.

One thread per rank: ranks share the machine's cores, and a library that has started its threads cannot be forked.
"""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch._dynamo  # which torch imports with the first optimizer or DDP model, and which takes as long as the rest
import torch.distributed
import torch.nn.parallel  # noqa: F401

import allstep.checkpoint.store
import allstep.engine
import allstep.world  # noqa: F401

gc.collect()
gc.freeze()  # a rank's collector then neither reads nor copies what it shares with the server
