"""Trains as many steps as its argument says; each reduces a number over the ranks."""

import sys

import allstep
from allstep import Engine

if __name__ == "__main__":
    with allstep.init() as world:
        state = Engine(lambda engine, batch: world.all_reduce(1.0)).run(range(int(sys.argv[1])))
        sys.stdout.write(f"trained {state.iteration}\n")  # in one piece: ranks may share the stream
