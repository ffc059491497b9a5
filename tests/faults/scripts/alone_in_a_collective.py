"""A handler of rank 0 reduces over the ranks, and the others have no such handler."""

import allstep
from allstep import Engine, Events

if __name__ == "__main__":
    with allstep.init() as world:
        trainer = Engine(lambda engine, batch: None, name="trainer")

        def evaluates() -> None:
            print("rank 0 goes alone", flush=True)
            world.all_reduce(1.0)

        if world.is_main:
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), evaluates)
        trainer.run(range(10))
