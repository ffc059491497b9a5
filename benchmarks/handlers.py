"""What handlers cost an iteration when none of them is due, and what those cost that look at every iteration.

The step does nothing. In the first case an engine has a progress bar, a track, evaluations by count and by time, a
time profiler, a timer, garbage collection, an output store, a profiler, device statistics, a keeper of the best,
schedules by epoch and by optimizer steps, averages of weights, frozen layers and clipped gradients, none of which has
anything to do before the end. The other cases are of one handler each, which has work in each iteration. All cases take
turns in each round, and the least of each over the rounds counts, since noise on a machine only adds. Time is what the
thread had of a processor. The cost of a case is its time above that of an engine without handlers.

Run with `pip install 'allstep[progress,stats]'`:

    python benchmarks/handlers.py [--iterations 50000] [--rounds 15]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

from allstep import (
    EMA,
    SWA,
    Alone,
    Engine,
    Evaluate,
    Events,
    Freeze,
    GradientClipping,
    ProgressBar,
    SaveBest,
    Schedule,
    Throughput,
    Track,
)
from allstep.handlers import DeviceStats, GarbageCollection, OutputStore, Profiler, TimeProfiler, Timer

from machine import machine_line

LIMIT = 0.1  # µs an iteration above the engine without handlers, when none is due
NEVER = 10**9
BATCH = torch.zeros(1)


class NoScreen:
    """A terminal on which nothing is seen; lines are laid out for it all the same."""

    seconds = 0.1
    columns = 120

    def draw(self, text: str) -> None:
        pass

    def leave(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def nothing(engine: object, batch: object) -> None:
    pass


def attach_all(engine: Engine, folder: str) -> None:
    evaluator = Engine(nothing, coordinator=Alone())
    evaluator.state.metrics["score"] = 0.0
    ProgressBar(screen=NoScreen()).attach(engine)
    Track(f"{folder}/track", every=NEVER).attach(engine)
    Evaluate(evaluator, [BATCH], every=(NEVER, "100 epochs", "10 hours")).attach(engine)
    TimeProfiler(range(NEVER, NEVER + 1)).attach(engine)
    Timer().attach(engine)
    GarbageCollection(NEVER).attach(engine)
    OutputStore(every=NEVER).attach(engine)
    Profiler(folder, range(NEVER, NEVER + 1)).attach(engine)
    DeviceStats(NEVER).attach(engine)
    SaveBest(folder, {"trainer": engine}, "score").attach(engine, evaluator)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    Schedule(lambda epochs: 1.0, optimizer).attach(engine, Events.EPOCH_COMPLETED)
    Schedule(lambda steps: 1.0, optimizer).attach(engine, Events.OPTIMIZER_STEP_COMPLETED(every=NEVER))
    EMA(model).attach(engine, Events.OPTIMIZER_STEP_COMPLETED(every=NEVER))
    SWA(model, start=NEVER).attach(engine)
    Freeze(model, {"*": 1}).attach(engine)
    GradientClipping(optimizer, max_norm=1.0).attach(engine)


CASES: dict[str, Callable[[Engine, str], object]] = {
    "without handlers": lambda engine, folder: None,
    "all, none due": attach_all,
    "Throughput, of samples": lambda engine, folder: Throughput().attach(engine),
    "Throughput, of tokens": lambda engine, folder: Throughput(torch.Tensor.numel).attach(engine),
    "OutputStore, of each output": lambda engine, folder: OutputStore().attach(engine),
    "TimeProfiler, of each iteration": lambda engine, folder: TimeProfiler().attach(engine),
}


def measure(attach: Callable[[Engine, str], object], iterations: int) -> float:
    """Seconds of the iterations of a run, without what handlers do at its beginning and end."""
    engine = Engine(nothing, coordinator=Alone())
    with tempfile.TemporaryDirectory() as folder:
        attach(engine, folder)
        marks: list[float] = []

        def batches():
            marks.append(time.thread_time())
            for _ in range(iterations):
                yield BATCH
            marks.append(time.thread_time())

        engine.run(batches(), max_epochs=1)
    return marks[1] - marks[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    best = dict.fromkeys(CASES, float("inf"))
    for _ in range(options.rounds):
        for name, attach in CASES.items():
            best[name] = min(best[name], measure(attach, options.iterations))
    print(f"{machine_line()}; {options.iterations} iterations, least of {options.rounds} rounds")
    bare = best["without handlers"]
    for name, seconds in best.items():
        above = 1e6 * (seconds - bare) / options.iterations
        print(f"{name:34}{1e6 * seconds / options.iterations:8.3f} µs an iteration{above:+9.3f}")
    above = 1e6 * (best["all, none due"] - bare) / options.iterations
    if above > LIMIT:
        print(f"all handlers, none due: {above:.3f} µs an iteration; at most {LIMIT} is wanted")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
