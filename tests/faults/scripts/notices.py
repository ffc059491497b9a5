"""Waits before torch is imported, then trains until a notice that came meanwhile ends the run."""

import os
import time
from importlib import import_module

if __name__ == "__main__":
    print("not yet imported", flush=True)
    while not os.path.exists("go"):
        time.sleep(0.01)  # the file is the only sign
    allstep = import_module("allstep")
    Engine, StopOnSignal = allstep.Engine, allstep.StopOnSignal
    with allstep.init() as world:
        trainer = Engine(lambda engine, batch: world.barrier())
        with StopOnSignal().attach(trainer):
            state = trainer.run(range(100_000))
        print("stopped by", state.stop_reason, flush=True)
