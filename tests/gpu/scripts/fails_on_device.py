"""Trains a few iterations and then fails in the way that its argument names, on CUDA or, rehearsed, on the CPU."""

import sys
import time

import torch

import allstep
from allstep import Engine

KIND = sys.argv[1]
FAILS_AT = 3


def fail(device: torch.device) -> None:
    cuda = device.type == "cuda"
    if KIND == "memory":
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    elif KIND == "assertion":
        if not cuda:
            raise RuntimeError("CUDA error: device-side assert triggered (rehearsed)")
        torch.zeros(4, device=device)[torch.tensor([9], device=device)]
        torch.cuda.synchronize()
    elif cuda:
        torch.cuda._sleep(1 << 38)  # minutes, by the clock of any GPU
        torch.ones(1, device=device).item()
    else:
        time.sleep(1000)


with allstep.init() as world:
    weight = torch.ones(8, device=world.device)

    def step(engine: Engine, batch: int) -> None:
        weight.mul_(0.5)
        if engine.state.iteration == FAILS_AT:
            fail(world.device)

    Engine(step).run(range(10))
