"""Trains with little more memory than it has by then."""

import resource
from pathlib import Path

import allstep
from allstep import Engine, Events

if __name__ == "__main__":
    with allstep.init() as world:
        trainer = Engine(lambda engine, batch: world.all_reduce(1.0))

        @trainer.on(Events.ITERATION_COMPLETED(once=5))
        def limit() -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + 2**29
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

        trainer.run(range(100), max_epochs=10)
