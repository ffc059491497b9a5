"""Trains with a guard against NaN: a step's output is a mean of its batch."""

import sys

import torch

import allstep
from allstep import Engine, TerminateOnNan

if __name__ == "__main__":
    with allstep.init() as world:
        trainer = Engine(lambda engine, batch: batch.mean())
        TerminateOnNan().attach(trainer)
        state = trainer.run([torch.ones(2)] * 500)
        sys.stdout.write(f"ended at {state.iteration}: {state.stop_reason}\n")  # in one piece: the stream may be shared
