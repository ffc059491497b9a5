"""Imported once by the server that ranks are forked from, so that no rank pays for importing torch.

One thread per rank: ranks share the machine's cores, and a library that has started its threads cannot be forked.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch.distributed
import torch.nn.parallel  # noqa: F401

import allstep.checkpoint.store
import allstep.engine
import allstep.world  # noqa: F401
