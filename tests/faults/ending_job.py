"""A training script for tests that end it in some way: says where it is, and what it saved.

python -m tests.faults.ending_job FOLDER [NAME=VALUE ...]

    at=PATH         what the script itself resumes from
    every=WHEN      when it saves
    patience=N      early stopping after N epochs that are no better
    nan=N           the step's output is not a number from iteration N on
    limit=SECONDS   a time limit
    evaluate=N      iterations of an evaluation at each epoch's end, which a second signal ends
    gate=FILE       from the second save on, writing waits until this file is there
    together=S      as for Preemption
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from itertools import repeat
from pathlib import Path

import allstep
from allstep import EarlyStopping, Engine, Events, Preemption, TerminateOnNan, TimeLimit
from allstep.checkpoint import Buffer, Checkpoint, LocalStorage, Store
from tests.checkpoint.training import Job, Run

PAUSE_S = 0.02


def say(text: object) -> None:
    print(text, flush=True)


class Waiting(LocalStorage):
    """Writes nothing until a file is there, but for the first checkpoint."""

    def __init__(self, root: str, gate: str) -> None:
        super().__init__(root)
        self.gate = Path(gate)

    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        if "000001" not in folder and not self.gate.exists():
            say(f"waits with {folder}")
            while not self.gate.exists():
                time.sleep(PAUSE_S)  # the file is the only sign
        super().write(folder, name, blocks)


def main(folder: str, *given: str) -> None:
    options = dict(each.split("=", 1) for each in given)
    with allstep.init() as world:
        run = Run(world, Job(f"{folder}-of-the-run", every=None))  # it has a Checkpoint too, which is not looked at
        trainer = run.engine
        place = Store("", storage=Waiting(folder, options["gate"])) if "gate" in options else folder
        objects = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler, "engine": trainer}
        checkpoint = Checkpoint(place, objects, every=options.get("every", "2 iterations")).attach(trainer)
        if "patience" in options:
            EarlyStopping(int(options["patience"]), lambda engine: 0.0, trainer).attach(trainer, Events.EPOCH_COMPLETED)
        checkpoint.resume(options.get("at", "auto"))
        evaluator = Engine(lambda engine, batch: time.sleep(PAUSE_S), name="evaluator")  # its work
        evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: say("evaluates"))
        if "evaluate" in options:
            trainer.add_event_handler(
                Events.EPOCH_COMPLETED, lambda: evaluator.run(repeat(0), max_iters=int(options["evaluate"]))
            )
        if "nan" in options:
            bad = int(options["nan"])
            TerminateOnNan(lambda output: math.nan if trainer.state.iteration >= bad else 0.0).attach(trainer)
        if "limit" in options:
            TimeLimit(float(options["limit"])).attach(trainer)
        Preemption(hurries=[evaluator], together=float(options.get("together", 2))).attach(trainer)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: say(f"iteration {trainer.state.iteration}"))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: time.sleep(PAUSE_S))  # its work
        trainer.run(run.data, max_epochs=int(options.get("epochs", 3)), window=1)
        say(f"ended: {trainer.state.outcome}, {trainer.state.stop_reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])
