"""Twenty steps, in each of which the ranks add up a tensor on their devices."""

import torch

import allstep
from allstep import Engine

with allstep.init() as world:
    weight = torch.ones(4, device=world.device)
    engine = Engine(lambda engine, batch: world.all_reduce(weight))
    engine.run(range(20))
    print(f"rank {world.rank} took {engine.state.iteration} steps", flush=True)
