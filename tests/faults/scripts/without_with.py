"""Rank 1 leaves a World that no `with` block closes: with `exit` as its argument by sys.exit(0), else by an error."""

import sys

import allstep

if __name__ == "__main__":
    world = allstep.init()
    world.barrier()
    if world.rank == 1:
        print("leaving", flush=True)
        if sys.argv[1] == "exit":
            sys.exit(0)
        raise KeyError("missing")
    world.barrier()
