"""Trains as many steps as its argument says, with gradients reduced over the ranks."""

import sys

import torch

import allstep
from allstep import Engine

if __name__ == "__main__":
    with allstep.init() as world:
        model = world.wrap(torch.nn.Linear(4, 1))

        def train_step(engine, batch):
            model.zero_grad()
            model(batch).sum().backward()

        state = Engine(train_step).run([torch.ones(2, 4)] * int(sys.argv[1]))
        sys.stdout.write(f"trained {state.iteration}\n")  # in one piece: ranks may share the stream
