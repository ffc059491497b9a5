"""What a framework costs a training loop: the language model of `examples/`, under each framework and in a bare loop.

Each framework trains in processes of its own, together with a bare loop that has a model and an optimizer of its own,
of the same kind. The two take turns: so many iterations of the framework's loop, then as many of the bare one, over and
over, in the same processes. So both have the same machine, and a drift of it cancels. The bare loop is called from
inside the framework's step, where that begins, and what the framework does between its steps is in its own time. The
table has the median of the ratios of neighbouring turns, and its 95 % interval by bootstrap.

Compared with a bare loop over DistributedDataParallel: allstep, Accelerate, PyTorch-Ignite, Lightning. With a bare loop
over `fully_shard` (FSDP2): allstep in the mesh `shard=-1`, Accelerate with its FSDP2 plugin, Lightning with
ModelParallelStrategy. A peer that is not installed, or that fails, is named with its reason. `--parts` measures what
parts of allstep add to the bare loop, one by one, and what is left of the whole without each of them.

On the CPU there are two ranks by default, on CUDA one for each device. A single rank has no DDP around its model.

    pip install allstep[bench]; python benchmarks/throughput.py [--parts] [--only allstep ...] [--blocks 40]
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from allstep import Alone, Engine, World
from allstep.errors import RanksError
from allstep.parallel import autocast, wrap_module
from allstep.testing import run_ranks

from agreement import interval
from language_model import Block, LanguageModel, loss_of
from machine import machine_line

AIM = 1.01
RATE = 1e-3


@dataclass(frozen=True)
class Size:
    """Of the model, a rank's batch and the measurement; `precision` is that of the forward passes."""

    width: int
    layers: int
    heads: int
    length: int
    rows: int
    precision: str
    blocks: int
    turn: int
    warm_up: int
    cpu_time: bool

    @property
    def iterations(self) -> int:
        """Of a framework's run."""
        return self.warm_up + self.blocks * self.turn + 1


@dataclass
class Job:
    """What the loops of one rank have in common."""

    world: World
    size: Size

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return LanguageModel(self.size.width, self.size.layers, self.size.heads).to(self.world.device)

    def in_ddp(self, model: nn.Module, **options: Any) -> nn.Module:
        return DistributedDataParallel(model, **options) if self.world.world_size > 1 else model

    def sharded(self, model: nn.Module) -> nn.Module:
        mesh = init_device_mesh(self.world.device.type, (self.world.world_size,))
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=RATE)

    def rows(self) -> torch.Tensor:
        """Random bytes for an epoch that all iterations of the measurement fit in."""
        count = (2 * self.size.iterations + self.size.warm_up) * self.size.rows * self.world.world_size
        shape = count, self.size.length + 1
        return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def plain_loader(self) -> DataLoader[torch.Tensor]:
        rows: Any = self.rows()
        sampler = DistributedSampler(rows, self.world.world_size, self.world.rank)
        pin = self.world.device.type == "cuda"
        return DataLoader(rows, self.size.rows, sampler=sampler, pin_memory=pin)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with autocast(self.world.device.type, self.size.precision):  # type: ignore[arg-type]
            return loss_of(model, batch)


def bare_loop(job: Job, model: nn.Module, loader: Any, before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A training loop as one writes it without a framework; each `next` does one iteration."""
    optimizer, device = job.optimizer(model), job.world.device
    for batch in loader:
        before()
        loss = job.loss(model, batch.to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


@dataclass
class Turns:
    """Seconds an iteration of each of a framework's turns, and of the turn of the bare loop that followed it."""

    bare: Iterator[None]
    size: Size
    device: torch.device
    seconds: list[tuple[float, float]] = field(default_factory=list)
    _begun: int = 0  # iterations
    _began: float = 0.0

    def iteration_begins(self) -> None:
        """Called by the framework's step before it does anything else."""
        timed = self._begun - self.size.warm_up
        self._begun += 1
        if timed < 0 or timed % self.size.turn:
            return
        ended, turn = self._now(), self.size.turn
        for _ in range(turn if timed else self.size.warm_up):
            next(self.bare)
        if timed:
            self.seconds.append(((ended - self._began) / turn, (self._now() - ended) / turn))
        if dist.is_initialized():
            dist.barrier()
        self._began = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.size.cpu_time else time.perf_counter()


# Frameworks. Each is written as its own documentation has it.


def bare(job: Job, turns: Turns, *, wrap: Callable[..., nn.Module] | None = None, loader: Any = None) -> None:
    """The same loop again: what the measurement itself shows where nothing differs."""
    model = job.in_ddp(job.model()) if wrap is None else wrap(job.model())
    loop = bare_loop(job, model, loader or job.plain_loader(), turns.iteration_begins)
    for _ in range(job.size.iterations):
        next(loop)


def allstep(
    job: Job, turns: Turns, *, wrap: Callable[..., nn.Module] | None = None, loader: Any = None, **options: Any
) -> None:
    world, model = job.world, (wrap or partial(job.world.wrap, units=Block))(job.model())
    optimizer = job.optimizer(model)

    def step(engine: Engine, batch: torch.Tensor) -> torch.Tensor:
        turns.iteration_begins()
        loss = loss_of(model, world.to_device(batch))
        optimizer.zero_grad()
        (loss * engine.state.weight).backward()
        optimizer.step()
        return loss.detach()

    engine = Engine(step, precision=job.size.precision, **options)  # type: ignore[arg-type]
    engine.run(
        loader or world.loader(job.rows(), batch_size=job.size.rows, shuffle=True), max_iters=job.size.iterations
    )


def ignite(job: Job, turns: Turns) -> None:
    from ignite.engine import Engine as IgniteEngine

    model = job.in_ddp(job.model())
    optimizer, device = job.optimizer(model), job.world.device

    def step(engine: object, batch: torch.Tensor) -> float:
        turns.iteration_begins()
        loss = job.loss(model, batch.to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    IgniteEngine(step).run(job.plain_loader(), max_epochs=1, epoch_length=job.size.iterations)


def accelerate(job: Job, turns: Turns, **options: Any) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=job.world.device.type == "cpu", mixed_precision=job.size.precision, **options)
    model = job.model()
    loader = DataLoader(job.rows(), job.size.rows, shuffle=True)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, job.optimizer(model), loader)
    if options and not isinstance(model, FSDPModule):
        raise RuntimeError("Accelerate has not sharded the model: it does that on accelerators only")
    for _, batch in zip(range(job.size.iterations), loader, strict=False):
        turns.iteration_begins()
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()


def accelerate_fsdp2(job: Job, turns: Turns) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[Block.__name__]
    )
    accelerate(job, turns, fsdp_plugin=plugin)


def lightning(job: Job, turns: Turns, strategy: Any = None, shard: Callable[[Any], None] | None = None) -> None:
    import lightning
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model()

        def configure_model(self) -> None:
            if shard is not None:
                shard(self)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            turns.iteration_begins()
            return loss_of(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer(self.model)

    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    several = job.world.world_size > 1
    trainer = lightning.Trainer(
        accelerator="gpu" if job.world.device.type == "cuda" else "cpu",
        devices=job.world.world_size,
        strategy=strategy or ("ddp" if several else "auto"),
        precision={"no": "32-true", "bf16": "bf16-mixed"}[job.size.precision],  # type: ignore[arg-type]
        plugins=[TorchElasticEnvironment()] if several else None,
        max_steps=job.size.iterations,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(job.rows(), job.size.rows, shuffle=True))  # type: ignore[arg-type]


def lightning_fsdp2(job: Job, turns: Turns) -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    def shard(module: Any) -> None:
        mesh = module.device_mesh["data_parallel"]
        for block in module.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module.model, mesh=mesh)

    size = job.world.world_size
    lightning(job, turns, ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1), shard)


def bare_fsdp2(job: Job, turns: Turns) -> None:
    bare(job, turns, wrap=job.sharded)


Contender = Callable[[Job, Turns], None]
DDP: dict[str, Contender] = {
    "bare loop": bare,
    "allstep": allstep,
    "Accelerate": accelerate,
    "PyTorch-Ignite": ignite,
    "Lightning": lightning,
}
FSDP2: dict[str, Contender] = {
    "bare FSDP2 loop": bare_fsdp2,
    "allstep FSDP2": allstep,
    "Accelerate FSDP2": accelerate_fsdp2,
    "Lightning FSDP2": lightning_fsdp2,
}


# Parts of allstep: each put into the bare loop alone, and each taken out of the whole.


def bare_with(part: str, job: Job, turns: Turns) -> None:
    world = job.world
    loader = partial(world.loader, job.rows(), batch_size=job.size.rows, shuffle=True)
    unwatched = partial(wrap_module, device=world.device, world_size=world.world_size)
    parts: dict[str, dict[str, Any]] = {
        "gradients in DDP's buckets": {"wrap": partial(job.in_ddp, gradient_as_bucket_view=True)},
        "world.wrap, unwatched": {"wrap": unwatched},
        "world.wrap": {"wrap": world.wrap},
        "world.loader": {"loader": loader()},
        "world.loader that seeds samples": {"loader": loader(sample_seeding="sample")},
    }
    bare(job, turns, **parts[part])


def allstep_without(part: str, job: Job, turns: Turns) -> None:
    plain = job.plain_loader()
    parts: dict[str, dict[str, Any]] = {
        "its loader": {"loader": plain},
        "its DDP": {"wrap": job.in_ddp},
        "votes": {"coordinator": Alone()},
        "all of these": {"loader": plain, "wrap": job.in_ddp, "coordinator": Alone()},
        "garbage collection": {},
    }
    if part == "garbage collection":
        gc.disable()
    allstep(job, turns, **parts[part])


def allstep_seeding(job: Job, turns: Turns) -> None:
    rows: Any = job.rows()
    loader = job.world.loader(rows, batch_size=job.size.rows, shuffle=True, sample_seeding="sample")
    allstep(job, turns, loader=loader)


ADDED = (
    "gradients in DDP's buckets",
    "world.wrap, unwatched",
    "world.wrap",
    "world.loader",
    "world.loader that seeds samples",
)
TAKEN = ("its loader", "its DDP", "votes", "all of these", "garbage collection")
PARTS: dict[str, Contender] = {
    "bare loop": bare,
    **{f"bare loop, with {part}": partial(bare_with, part) for part in ADDED},
    "allstep": allstep,
    "allstep that seeds samples": allstep_seeding,
    **{f"allstep, without {part}": partial(allstep_without, part) for part in TAKEN},
}


def measure(world: World, name: str, size: Size) -> list[tuple[float, float]]:
    """One rank's part: a framework's run, in turns with a bare loop."""
    if world.device.type == "cpu":
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    job = Job(world, size)
    model = job.sharded(job.model()) if name in FSDP2 else job.in_ddp(job.model())
    turns = Turns(bare_loop(job, model, job.plain_loader()), size, world.device)
    {**DDP, **FSDP2, **PARTS}[name](job, turns)
    return turns.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    on_cuda = torch.cuda.is_available()
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() if on_cuda else 2)
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16" if on_cuda else "no")
    defaults = {"width": 128, "layers": 3, "heads": 4, "length": 128, "rows": 4, "blocks": 40, "turn": 10}
    for option, default in {**defaults, "warm_up": 40}.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--cpu-time", action="store_true", help="processor time of a rank, where the machine is busy")
    parser.add_argument("--parts", action="store_true", help="what allstep's parts cost, in place of other frameworks")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="rows whose names begin so")
    options = vars(parser.parse_args())
    ranks, parts, only = options.pop("ranks"), options.pop("parts"), tuple(options.pop("only"))
    size = Size(**options)
    print(machine_line())
    print(f"\n{ranks} ranks; {size}\n")
    print(f"| | ms an iteration | of the bare loop beside it | ratio | 95 % interval | at most {AIM}? |")
    print("|---|---:|---:|---:|---:|---|")
    for name in PARTS if parts else {**DDP, **FSDP2}:
        if only and not name.startswith(only):
            continue
        mesh = {"ALLSTEP_MESH": "shard=-1"} if name == "allstep FSDP2" else {}
        try:
            found = run_ranks(measure, ranks, name, size, timeout=3600, env=mesh)[0]
        except RanksError as error:
            print(f"| {name} | not measured: {str(error).strip().splitlines()[-1]} |", flush=True)
            continue
        ratios = [own / beside for own, beside in found]
        low, high = interval(ratios)
        own, beside = (statistics.median(each) * 1e3 for each in zip(*found, strict=True))
        said = "yes" if high <= AIM else "no" if low > AIM else "cannot tell"
        shown = f"{statistics.median(ratios):.3f} | {low:.3f} to {high:.3f}"
        print(f"| {name} | {own:.2f} | {beside:.2f} | {shown} | {said} |", flush=True)


if __name__ == "__main__":
    main()
