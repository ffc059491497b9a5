"""What a checkpoint costs: how long training is blocked, how long until it is committed, how long to load it again.

Two gloo ranks on this machine hold the same model in DDP, of float32 weights in layers of 4 MB, and its SGD optimizer.
Each contender saves several times to a folder of its own, and then loads. Saves begin together and the slower rank
counts. The first save and the median of the others are shown apart, because staging memory and the file system's are
taken by the first.

- allstep: `Store`, `verify="full"`. Blocked: until `save` returns. Committed: until every file is synchronised, hashed,
  and renamed. Loading includes reading and hashing every file first.
- torch.save from rank 0 to another name and a rename, then a barrier; nothing is synchronised. torch.load.
- Accelerate: `save_state` and `load_state`.
- Lightning: Fabric's `save` and `load`.
- PyTorch-Ignite: `Checkpoint` with a `DiskSaver` that keeps one; torch.load and `load_objects`.

The four block until their file is written, and none synchronises or verifies. Files are read from the page cache.

    pip install allstep[bench]; python benchmarks/checkpoint.py [--sizes 10 200] [--saves 6] [--quick]
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import machine_line

from allstep import World
from allstep.testing import run_ranks

AIM = 1 / 5


@dataclass(frozen=True)
class Contender:
    """`save(step)` returns when training may go on, `commit()` when the last save is done, `load()` when it is read."""

    save: Callable[[int], Any]
    load: Callable[[], Any]
    commit: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Figures:
    """Seconds; `blocked` and `committed` for each save, on the slower rank."""

    blocked: list[float]
    committed: list[float]
    load: float


def model_of(megabytes: int) -> nn.Module:
    layers = max(1, megabytes * 1_000_000 // (4 * 1000 * 1000))
    return nn.Sequential(*(nn.Linear(1000, megabytes * 250_000 // (1000 * layers)) for _ in range(layers)))


def with_allstep(world: World, model: nn.Module, optimizer: Any, folder: Path) -> Contender:
    from allstep.checkpoint import Store

    inner = world.unwrap(model)
    store = Store(str(folder), keep_last=1)

    def save(step: int) -> None:
        store.save(step, {"model": inner.state_dict(), "optimizer": optimizer.state_dict()})

    def load() -> None:
        found = store.choose()
        assert found is not None
        state = store.load(found).state
        inner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def commit() -> None:
        assert store.wait()

    return Contender(save, load, commit)


def with_torch(world: World, model: nn.Module, optimizer: Any, folder: Path) -> Contender:
    inner = world.unwrap(model)

    def save(step: int) -> None:
        if world.is_main:
            torch.save({"model": inner.state_dict(), "optimizer": optimizer.state_dict()}, folder / "new.pt")
            os.replace(folder / "new.pt", folder / "last.pt")
        world.barrier()

    def load() -> None:
        state = torch.load(folder / "last.pt", weights_only=True)
        inner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    return Contender(save, load)


def with_accelerate(world: World, model: nn.Module, optimizer: Any, folder: Path) -> Contender:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(world.unwrap(model), optimizer)
    return Contender(
        lambda step: accelerator.save_state(str(folder / "last")), lambda: accelerator.load_state(str(folder / "last"))
    )


def with_lightning(world: World, model: nn.Module, optimizer: Any, folder: Path) -> Contender:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=world.world_size, strategy="ddp")
    fabric.launch()
    prepared, its_optimizer = fabric.setup(world.unwrap(model), optimizer)
    state = {"model": prepared, "optimizer": its_optimizer}
    return Contender(
        lambda step: fabric.save(folder / "last.ckpt", state), lambda: fabric.load(folder / "last.ckpt", state)
    )


def with_ignite(world: World, model: nn.Module, optimizer: Any, folder: Path) -> Contender:
    from ignite.engine import Engine
    from ignite.handlers import Checkpoint, DiskSaver, global_step_from_engine

    parts = {"model": model, "optimizer": optimizer}
    engine = Engine(lambda *_: None)
    engine.state.epoch = engine.state.iteration = 0
    saver = DiskSaver(str(folder), create_dir=True, require_empty=False)
    handler = Checkpoint(parts, saver, n_saved=1, global_step_transform=global_step_from_engine(engine))

    def save(step: int) -> None:
        engine.state.epoch = step
        handler(engine)
        world.barrier()

    def load() -> None:
        state = torch.load(folder / str(handler.last_checkpoint), weights_only=True)
        Checkpoint.load_objects(parts, state)

    return Contender(save, load)


CONTENDERS = {
    "allstep": with_allstep,
    "torch.save": with_torch,
    "Accelerate": with_accelerate,
    "Lightning Fabric": with_lightning,
    "Ignite": with_ignite,
}


def measure(world: World, name: str, megabytes: int, saves: int, folder: Path) -> Figures:
    warnings.simplefilter("ignore")
    for noisy in ("ignite", "lightning", "lightning.fabric", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    model = world.wrap(model_of(megabytes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    contender = CONTENDERS[name](world, model, optimizer, folder)
    blocked, committed = [], []
    for step in range(1, saves + 1):
        gc.collect()
        world.barrier()
        start = time.perf_counter()
        contender.save(step)
        blocked.append(slowest(world, time.perf_counter() - start))
        contender.commit()
        committed.append(slowest(world, time.perf_counter() - start))
    world.barrier()
    start = time.perf_counter()
    contender.load()
    return Figures(blocked, committed, slowest(world, time.perf_counter() - start))


def slowest(world: World, seconds: float) -> float:
    return float(world.all_reduce(seconds, op="max"))


def compare(names: list[str], megabytes: int, saves: int, parent: Path) -> dict[str, Figures]:
    figures = {}
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=parent))
        try:
            figures[name] = run_ranks(measure, 2, name, megabytes, saves, folder, timeout=900.0)[0]
        except Exception as error:
            print(f"{name} could not be measured: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        finally:
            shutil.rmtree(folder)
    return figures


def table(figures: dict[str, Figures]) -> list[str]:
    lines = [
        "| | blocked, first | blocked, steady | committed, first | committed, steady | load |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in figures.items():
        cells = (each.blocked[0], steady(each.blocked), each.committed[0], steady(each.committed), each.load)
        lines.append(f"| {name} | " + " | ".join(f"{cell * 1e3:,.0f} ms" for cell in cells) + " |")
    return lines


def steady(seconds: list[float]) -> float:
    return statistics.median(seconds[1:] or seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10, 200], metavar="MB", help="10, 200 and 1000 in docs"
    )
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="CONTENDER")
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--quick", action="store_true", help="10 MB, three saves")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.saves = [10], 3
    print(machine_line())
    for megabytes in arguments.sizes:
        figures = compare(arguments.only, megabytes, arguments.saves, arguments.folder)
        print(f"\n{megabytes} MB, 2 ranks, {arguments.saves} saves\n")
        print("\n".join(table(figures)))
        peers = [steady(each.blocked) for name, each in figures.items() if name != "allstep"]
        if "allstep" in figures and peers:
            ratio = steady(figures["allstep"].blocked) / min(peers)
            print(f"\nsteady blocked time against the best peer: {ratio:.3f} (aim at 200 MB: {AIM})")


if __name__ == "__main__":
    main()
