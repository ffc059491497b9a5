"""What a checkpoint costs: how long training is blocked, how long until it is committed, how long to load it again.

Two gloo ranks on this machine hold one model of float32 weights in layers of 4 MB, and its SGD optimizer, which all
contenders save and load. They take turns: in each round each of them saves once to a folder of its own, in an order
that moves on by one from round to round, after what was written before has reached the disk. Saves begin together and
the slower rank counts. The first round and the median of the others are shown apart, because staging memory and the
file system's are taken by the first. Then they take turns in loading.

- allstep: `Store`, `verify="full"`. Blocked: until `save` returns. Committed: until every file is synchronised, hashed,
  and renamed. Verified: every file was read and hashed. Loading comes after that.
- torch.save from rank 0 to another name and a rename, then a barrier; nothing is synchronised. torch.load.
- Accelerate: `save_state` and `load_state`.
- Lightning: Fabric's `save` and `load`.
- PyTorch-Ignite: `Checkpoint` with a `DiskSaver` that keeps one; torch.load and `load_objects`.

The four block until their file is written, and none synchronises or verifies. Files are read from the page cache.
A model of 1,000 MB takes about 8 GB of memory and 10 GB of disk.

    pip install allstep[bench]; python benchmarks/checkpoint.py [--sizes 10 200 1000] [--saves 6] [--quick]
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from allstep import World
from allstep.testing import run_ranks

from machine import machine_line

AIM = 1 / 5


@dataclass(frozen=True)
class Contender:
    """`save(step)` returns when training may go on, `commit()` when it is done, `load(verify())` when it is read."""

    save: Callable[[int], Any]
    load: Callable[[Any], Any]
    commit: Callable[[], Any] = lambda: None
    verify: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Figures:
    """Seconds on the slower rank, for each save and each load; `verified` is empty where nothing is verified."""

    blocked: list[float] = field(default_factory=list)
    committed: list[float] = field(default_factory=list)
    verified: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)


def model_of(megabytes: int) -> nn.Module:
    layers = max(1, megabytes * 1_000_000 // (4 * 1000 * 1000))
    model = nn.Sequential(*(nn.Linear(1000, megabytes * 250_000 // (1000 * layers)) for _ in range(layers)))
    for parameter in list(model.parameters())[1:]:  # nothing is trained; each DDP would hold gradients of its own
        parameter.requires_grad_(False)
    return model


def with_allstep(world: World, model: nn.Module, optimizer: Any, folder: Path) -> Contender:
    from allstep.checkpoint import Store

    inner = world.unwrap(model)
    store = Store(str(folder), keep_last=1)

    def save(step: int) -> None:
        store.save(step, {"model": inner.state_dict(), "optimizer": optimizer.state_dict()})

    def load(found: Any) -> None:
        assert found is not None
        state = store.load(found).state
        inner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def commit() -> None:
        assert store.wait()

    return Contender(save, load, commit, store.choose)


def with_torch(world: World, model: nn.Module, optimizer: Any, folder: Path) -> Contender:
    inner = world.unwrap(model)

    def save(step: int) -> None:
        if world.is_main:
            torch.save({"model": inner.state_dict(), "optimizer": optimizer.state_dict()}, folder / "new.pt")
            os.replace(folder / "new.pt", folder / "last.pt")
        world.barrier()

    def load(_: Any) -> None:
        state = torch.load(folder / "last.pt", weights_only=True)
        inner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    return Contender(save, load)


def with_accelerate(world: World, model: nn.Module, optimizer: Any, folder: Path) -> Contender:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(world.unwrap(model), optimizer)
    return Contender(
        lambda step: accelerator.save_state(str(folder / "last")),
        lambda _: accelerator.load_state(str(folder / "last")),
    )


def with_lightning(world: World, model: nn.Module, optimizer: Any, folder: Path) -> Contender:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=world.world_size, strategy="ddp")
    fabric.launch()
    prepared, its_optimizer = fabric.setup(world.unwrap(model), optimizer)
    state = {"model": prepared, "optimizer": its_optimizer}
    return Contender(
        lambda step: fabric.save(folder / "last.ckpt", state), lambda _: fabric.load(folder / "last.ckpt", state)
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

    def load(_: Any) -> None:
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


def contenders_for(world: World, names: list[str], megabytes: int, parent: Path) -> dict[str, Contender]:
    inner = model_of(megabytes)
    model = world.wrap(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {}
    for name in names:
        folder = parent / name.replace(" ", "-")
        if world.is_main:
            folder.mkdir()
        world.barrier()
        try:
            found[name] = CONTENDERS[name](world, model, optimizer, folder)
        except ImportError as error:
            if name == "allstep":
                raise
            world.print(f"{name} is left out: {error}")
    return found


def measure(world: World, names: list[str], megabytes: int, saves: int, loads: int, parent: Path) -> dict[str, Figures]:
    warnings.simplefilter("ignore")
    for noisy in ("ignite", "lightning", "lightning.fabric", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    contenders = contenders_for(world, names, megabytes, parent)
    figures = {name: Figures() for name in contenders}
    for step in range(1, saves + 1):
        for name in in_turn(contenders, step):
            start = begin(world)
            contenders[name].save(step)
            figures[name].blocked.append(slowest(world, time.perf_counter() - start))
            contenders[name].commit()
            figures[name].committed.append(slowest(world, time.perf_counter() - start))
    for step in range(1, loads + 1):
        for name in in_turn(contenders, step):
            verify, found = contenders[name].verify, None
            if verify is not None:
                start = begin(world)
                found = verify()
                figures[name].verified.append(slowest(world, time.perf_counter() - start))
            start = begin(world)
            contenders[name].load(found)
            figures[name].loaded.append(slowest(world, time.perf_counter() - start))
    return figures


def in_turn(contenders: dict[str, Contender], step: int) -> list[str]:
    names = list(contenders)
    first = step % len(names)
    return names[first:] + names[:first]


def begin(world: World) -> float:
    gc.collect()
    if world.is_main:
        os.sync()
    world.barrier()
    return time.perf_counter()


def slowest(world: World, seconds: float) -> float:
    return float(world.all_reduce(seconds, op="max"))


def compare(names: list[str], megabytes: int, saves: int, loads: int, parent: Path) -> dict[str, Figures]:
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=parent))
    try:
        return run_ranks(measure, 2, names, megabytes, saves, loads, folder, timeout=1800.0)[0]
    finally:
        shutil.rmtree(folder)


def table(figures: dict[str, Figures]) -> list[str]:
    lines = [
        "| | blocked, first | blocked, steady | committed, first | committed, steady | verified | loaded |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, each in figures.items():
        seconds = [each.blocked[0], steady(each.blocked), each.committed[0], steady(each.committed)]
        seconds += [statistics.median(times) if times else None for times in (each.verified, each.loaded)]
        cells = ("" if cell is None else f"{cell * 1e3:,.1f} ms" for cell in seconds)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def steady(seconds: list[float]) -> float:
    return statistics.median(seconds[1:] or seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10, 200], metavar="MB", help="10, 200 and 1000 in docs"
    )
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="CONTENDER")
    parser.add_argument("--saves", type=int, default=6, help="rounds of saves; 3 at most from 1000 MB on")
    parser.add_argument("--loads", type=int, default=3, help="rounds of loads")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--quick", action="store_true", help="10 MB, three saves, one load")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.saves, arguments.loads = [10], 3, 1
    print(machine_line())
    for megabytes in arguments.sizes:
        saves = min(arguments.saves, 3) if megabytes >= 1000 else arguments.saves
        figures = compare(arguments.only, megabytes, saves, arguments.loads, arguments.folder)
        print(f"\n{megabytes:,} MB, 2 ranks, {saves} saves, {arguments.loads} loads\n")
        print("\n".join(table(figures)), flush=True)
        peers = [steady(each.blocked) for name, each in figures.items() if name != "allstep"]
        if "allstep" in figures and peers:
            ratio = steady(figures["allstep"].blocked) / min(peers)
            print(f"\nsteady blocked time against the best peer: {ratio:.3f} (aim at 200 MB: {AIM})", flush=True)


if __name__ == "__main__":
    main()
