"""What each trainer does with data that differs by rank: three gloo ranks, streams of 90, 190 and 270 samples.

Each rank reads its own stream, in batches of 16, for two epochs; nobody is told how long it is. Every contender is
given the same model and the same streams through a DataLoader, in three fresh processes. Collectives give up after
--timeout seconds, and what still runs after --limit is ended. The ranks write down each step as it begins and ends, so
that the table shows what was trained whatever happened:

- outcome: finished, failed with an error, or still waiting;
- samples trained: by each rank, over both epochs (complete would be 180, 380 and 540);
- of all samples: distinct ones that any rank trained, of 550;
- mixed steps: optimizer steps in which gradients of different epochs were averaged. The n-th steps of all ranks belong
  together, except under a Join around each epoch, which lets no rank into the next before all are done.

    pip install allstep[bench]; python benchmarks/uneven_peers.py [--timeout 10] [--limit 60]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import machine_line

SHARDS, EPOCHS, BATCH = (90, 190, 270), 2, 16
RANKS = len(SHARDS)
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Stream(IterableDataset[Any]):
    """A rank's samples, without a length: (x, y, number of the sample among all)."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[Any]:
        first = sum(SHARDS[: self.rank])
        noise = torch.Generator().manual_seed(self.rank)
        for number in range(first, first + SHARDS[self.rank]):
            x = torch.rand(1, generator=noise) * 6 - 3
            yield x, torch.sin(x), number


class Log:
    """A line for each step that began, and one for each that ended."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def begin(self, epoch: int, batch: Batch) -> None:
        print(json.dumps({"epoch": epoch, "samples": batch[2].tolist()}), file=self.file, flush=True)

    def end(self) -> None:
        print(json.dumps("trained"), file=self.file, flush=True)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


class Training:
    """A model in DDP with its optimizer."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.model = DistributedDataParallel(network())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def step(self, epoch: int, batch: Batch, weight: float = 1.0) -> None:
        self.log.begin(epoch, batch)
        loss = F.mse_loss(self.model(batch[0]), batch[1])
        self.optimizer.zero_grad()
        (loss * weight).backward()
        self.optimizer.step()
        self.log.end()

    def epochs(self, loader: Any) -> None:
        for epoch in range(EPOCHS):
            for batch in loader:
                self.step(epoch, batch)


def loader() -> DataLoader[Any]:
    return DataLoader(Stream(dist.get_rank()), batch_size=BATCH)


def plain(log: Log, limit: float) -> None:
    Training(log).epochs(loader())


def join(log: Log, limit: float) -> None:
    training = Training(log)
    for epoch in range(EPOCHS):
        with Join([training.model]):  # type: ignore[list-item]
            for batch in loader():
                training.step(epoch, batch)


def join_around_all_epochs(log: Log, limit: float) -> None:
    training = Training(log)
    with Join([training.model]):  # type: ignore[list-item]
        training.epochs(loader())


def accelerate(log: Log, limit: float, **options: Any) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
    model = network()
    model, optimizer, batches = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01), loader())
    for epoch in range(EPOCHS):
        for batch in batches:
            log.begin(epoch, batch)
            loss = F.mse_loss(model(batch[0]), batch[1])
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            log.end()


def accelerate_sharding(log: Log, limit: float) -> None:
    accelerate(log, limit, dispatch_batches=False)


def ignite(log: Log, limit: float) -> None:
    from ignite.engine import Engine

    training = Training(log)
    Engine(lambda engine, batch: training.step(engine.state.epoch - 1, batch)).run(loader(), max_epochs=EPOCHS)


def lightning(log: Log, limit: float) -> None:
    import lightning as L
    from lightning.pytorch.strategies import DDPStrategy

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: Batch, index: int) -> torch.Tensor:
            log.begin(self.current_epoch, batch)
            return F.mse_loss(self.model(batch[0]), batch[1])

        def on_train_batch_end(self, *arguments: object) -> None:
            log.end()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=RANKS,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=limit)),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), loader())


def allstep(log: Log, limit: float, uneven: str) -> None:
    import allstep
    from allstep import Engine

    with allstep.init(timeout=limit) as world:
        training = Training(log)

        def step(engine: Engine, batch: Batch) -> None:
            if not engine.state.active:
                batch = (batch[0], batch[1], torch.tensor([], dtype=torch.int64))
            training.step(engine.state.epoch - 1, batch, engine.state.weight)

        trainer = Engine(step)
        trainer.modules.append(training.model)
        trainer.run(DataLoader(Stream(world.rank), batch_size=BATCH), max_epochs=EPOCHS, uneven=uneven)  # type: ignore[arg-type]


def allstep_shortest(log: Log, limit: float) -> None:
    allstep(log, limit, "shortest")


def allstep_longest(log: Log, limit: float) -> None:
    allstep(log, limit, "longest")


@dataclass(frozen=True)
class Contender:
    run: Callable[[Log, float], None]
    needs: str = "torch"
    epochs_end_together: bool = False


CONTENDERS = {
    "plain DDP loop": Contender(plain),
    "DDP, Join around each epoch": Contender(join, epochs_end_together=True),
    "DDP, Join around all epochs": Contender(join_around_all_epochs),
    "Accelerate, as it comes (dispatching)": Contender(accelerate, "accelerate"),
    "Accelerate, dispatch_batches=False": Contender(accelerate_sharding, "accelerate"),
    "PyTorch-Ignite": Contender(ignite, "ignite"),
    "Lightning": Contender(lightning, "lightning"),
    "allstep, shortest": Contender(allstep_shortest),
    "allstep, longest": Contender(allstep_longest),
}


def be_rank(name: str, folder: Path, limit: float) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with (folder / f"{os.environ['RANK']}.jsonl").open("w") as file:
        if name.startswith("allstep"):
            CONTENDERS[name].run(Log(file), limit)
        else:
            dist.init_process_group("gloo", timeout=timedelta(seconds=limit))
            CONTENDERS[name].run(Log(file), limit)
            dist.barrier()
            dist.destroy_process_group()


@dataclass
class Outcome:
    took: float
    codes: list[int | None]
    errors: list[str]
    steps: list[list[tuple[int, list[int]]]]  # of each rank: (epoch, samples), those that ended

    @property
    def text(self) -> str:
        waiting = [rank for rank, code in enumerate(self.codes) if code is None]
        if waiting:
            return f"ranks {waiting} still waiting after {self.took:.0f} s"
        if any(self.codes):
            return f"failed after {self.took:.0f} s"
        return "finished"

    @property
    def samples(self) -> list[int]:
        return [sum(len(numbers) for _, numbers in steps) for steps in self.steps]

    @property
    def distinct(self) -> int:
        return len({number for steps in self.steps for _, numbers in steps for number in numbers})

    @property
    def mixed(self) -> int:
        met = zip_longest(*([epoch for epoch, _ in steps] for steps in self.steps))
        return sum(len({epoch for epoch in epochs if epoch is not None}) > 1 for epochs in met)


def steps_of(file: Path) -> list[tuple[int, list[int]]]:
    """The steps that ended."""
    steps: list[tuple[int, list[int]]] = []
    begun = None
    for line in file.read_text().splitlines() if file.exists() else []:
        entry = json.loads(line)
        if entry == "trained":
            steps.append(begun)  # type: ignore[arg-type]
        else:
            begun = (entry["epoch"], entry["samples"])
    return steps


def last_error(text: str) -> str:
    said = [line for line in text.splitlines() if "Error" in line and "frame #" not in line]
    return said[-1].strip() if said else ""


def measure(name: str, timeout: float, limit: float) -> Outcome:
    from allstep.launch.environment import ReservedPort, worker_environment

    command = [sys.executable, __file__, "--case", name, "--timeout", str(timeout), "--folder"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = stack.enter_context(ReservedPort(shared=True)).port
        began = time.monotonic()
        processes = []
        for rank in range(RANKS):
            place = worker_environment(
                rank=rank,
                world_size=RANKS,
                local_rank=rank,
                local_world_size=RANKS,
                master_addr="127.0.0.1",
                master_port=port,
                run_id="uneven",
            )
            errors = stack.enter_context((folder / f"{rank}.err").open("w"))
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **place}
            processes.append(
                subprocess.Popen([*command, str(folder)], env=environment, stdout=errors, stderr=subprocess.STDOUT)
            )
        codes: list[int | None] = []
        try:
            for process in processes:
                try:
                    codes.append(process.wait(max(0.1, began + limit - time.monotonic())))
                except subprocess.TimeoutExpired:
                    codes.append(None)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        took = time.monotonic() - began
        said = [last_error((folder / f"{rank}.err").read_text(errors="replace")) for rank in range(RANKS)]
        return Outcome(took, codes, said, [steps_of(folder / f"{rank}.jsonl") for rank in range(RANKS)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds after which a collective gives up")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which ranks are ended")
    parser.add_argument("--only", help="run only contenders whose name contains this")
    parser.add_argument("--case", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        be_rank(options.case, options.folder, options.timeout)
        return
    print(machine_line())
    print(f"\n{RANKS} gloo ranks, {EPOCHS} epochs; collectives give up after {options.timeout:g} s.\n")
    print("| | outcome | samples trained by rank 0, 1, 2 | of all samples | mixed steps |\n|---|---|---|---:|---:|")
    details = []
    for name, contender in CONTENDERS.items():
        if options.only and options.only not in name:
            continue
        if find_spec(contender.needs) is None:
            print(f"| {name} | not installed | | | |")
            continue
        found = measure(name, options.timeout, options.limit)
        samples = ", ".join(map(str, found.samples))
        mixed = 0 if contender.epochs_end_together else found.mixed
        print(f"| {name} | {found.text} | {samples} | {found.distinct} of {sum(SHARDS)} | {mixed} |", flush=True)
        details += [f"- {name}, rank {rank}: {error}" for rank, error in enumerate(found.errors) if error]
    if details:
        print("\nWhat the ranks said last:\n")
        print("\n".join(details))


if __name__ == "__main__":
    main()
