"""What an iteration of the loop costs above a bare `for` loop: allstep, PyTorch-Ignite and Lightning in one run.

The step does nothing, so all that is measured is the loop's own work. Two cases: no handlers, and ten handlers each due
every 100 iterations. Contenders take turns in each round and the minimum over the rounds counts, since noise on a
machine only adds. Run with `pip install allstep[bench]`:

    python benchmarks/engine_overhead.py [--iterations 200000] [--rounds 7]
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import machine_line

HANDLERS, EVERY = 10, 100
LIMITS = {"no handlers": 0.25, "ten handlers, every=100": 0.6}  # µs above the bare loop that allstep aims for


def nothing(engine: object, batch: object) -> None:
    pass


def handler(engine: object) -> None:
    pass


def bare(iterations: int, handlers: int) -> float:
    began = time.perf_counter()
    for batch in range(iterations):
        nothing(None, batch)
    return time.perf_counter() - began


def allstep_engine(iterations: int, handlers: int) -> float:
    from allstep import Engine, Events

    engine = Engine(nothing)
    for _ in range(handlers):
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=EVERY), handler)
    began = time.perf_counter()
    engine.run(range(iterations))
    return time.perf_counter() - began


def ignite_engine(iterations: int, handlers: int) -> float:
    from ignite.engine import Engine, Events

    engine = Engine(nothing)
    for _ in range(handlers):
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=EVERY), handler)
    began = time.perf_counter()
    engine.run(range(iterations))
    return time.perf_counter() - began


def lightning_trainer(iterations: int, handlers: int) -> float:
    import lightning
    import torch

    iterations = iterations // 20  # two orders slower: fewer are enough

    class Nothing(lightning.LightningModule):
        automatic_optimization = False
        took = 0.0

        def training_step(self, batch: object, index: int) -> None:
            pass

        def configure_optimizers(self) -> None:
            return None

        def on_train_start(self) -> None:
            self.began = time.perf_counter()

        def on_train_end(self) -> None:
            self.took = time.perf_counter() - self.began

    class Every(lightning.Callback):
        def on_train_batch_end(self, trainer: object, module: object, outputs: object, batch: object, at: int) -> None:
            if (at + 1) % EVERY == 0:
                handler(None)

    module = Nothing()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Every() for _ in range(handlers)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(range(iterations), batch_size=None))
    loader_began = time.perf_counter()
    for _ in torch.utils.data.DataLoader(range(iterations), batch_size=None):
        pass
    loader = time.perf_counter() - loader_began  # a Trainer wants a DataLoader: its own time is not the loop's
    return (module.took - loader) * 20


CONTENDERS: dict[str, Callable[[int, int], float]] = {
    "bare loop": bare,
    "allstep": allstep_engine,
    "PyTorch-Ignite": ignite_engine,
    "Lightning Trainer": lightning_trainer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("ignite", "lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)

    cases = {"no handlers": 0, f"ten handlers, every={EVERY}": HANDLERS}
    best: dict[tuple[str, str], float] = {}
    missing: set[str] = set()
    for _ in range(options.rounds):
        for case, handlers in cases.items():
            for name, run in CONTENDERS.items():
                if name in missing:
                    continue
                try:
                    took = run(options.iterations, handlers) / options.iterations * 1e6
                except ImportError:
                    if name == "allstep":
                        raise
                    missing.add(name)
                    continue
                best[name, case] = min(took, best.get((name, case), float("inf")))

    print(machine_line())
    print(f"\nµs an iteration above a bare loop, minimum of {options.rounds} rounds of {options.iterations}:\n")
    print("| | " + " | ".join(cases) + " |\n|---|" + "---:|" * len(cases))
    for name in CONTENDERS:
        if name == "bare loop":
            cells = [f"({best[name, case]:.3f} itself)" for case in cases]
        elif name in missing:
            cells = ["not installed"] * len(cases)
        else:
            cells = [f"{best[name, case] - best['bare loop', case]:.2f}" for case in cases]
        print(f"| {name} | " + " | ".join(cells) + " |")
    within = all(best["allstep", case] - best["bare loop", case] <= LIMITS[case] for case in cases)
    print(f"\nallstep within its aims ({', '.join(f'{case}: {LIMITS[case]} µs' for case in cases)}): {within}")


if __name__ == "__main__":
    main()
