"""A training script for tests that kill it: says where it is and, at its end, saves its weights.

python -m tests.checkpoint.job FOLDER OUT [every] [seconds a step takes] [DataLoader workers] [epochs] [keep_last]
"""

from __future__ import annotations

import os
import sys
import time

import torch

import allstep
from allstep import Events, Preemption
from tests.checkpoint.training import Job, Run


def main(
    folder: str,
    out: str,
    every: str = "2 iterations",
    pause: str = "0",
    workers: str = "0",
    epochs: str = "3",
    keep_last: str = "3",
) -> None:
    with allstep.init() as world:
        run = Run(world, Job(folder, every=every, workers=int(workers), keep_last=int(keep_last)))
        run.checkpoint.resume()
        Preemption(requeue="JOB_REQUEUE" in os.environ).attach(run.engine)
        run.engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: time.sleep(float(pause)))  # its work
        run.engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: print(f"iteration {engine.state.iteration}", flush=True)
        )
        run.engine.run(run.data, max_epochs=int(epochs), window=1)
        if world.is_main:
            torch.save([run.weights(), run.engine.state.iteration], out)
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
