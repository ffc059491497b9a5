"""A loop of one's own, in which rank 1 is for long in one call that holds the interpreter's lock."""

import ctypes
import sys
import time

import torch

import allstep

if __name__ == "__main__":
    how, seconds = sys.argv[1], float(sys.argv[2])
    with allstep.init() as world:
        world.all_reduce(torch.ones(1))
        if world.rank == 1 and how == "sleeps":
            ctypes.PyDLL(None).usleep(int(seconds * 1e6))
        elif world.rank == 1:
            began = time.monotonic()
            sum(range(10**6))
            rate = 10**6 / (time.monotonic() - began)
            sum(range(int(rate * seconds)))
        world.all_reduce(torch.ones(1))
        sys.stdout.write("trained on\n")  # in one piece: ranks may share the stream
