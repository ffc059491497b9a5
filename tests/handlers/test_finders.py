"""LRFinder and BatchSizeFinder: what they find, that ranks agree, and that nothing is changed by them."""

from __future__ import annotations

import copy
import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, TensorDataset

from allstep import (
    EMA,
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    Engine,
    Events,
    LRFinder,
    SaveBest,
    Schedule,
    Track,
    World,
    create_supervised_trainer,
)
from allstep.errors import ArgumentError, ArgumentTypeError, EngineError
from allstep.parallel import is_dtensor
from allstep.testing import run_ranks
from tests.regression import Killed, same


def _copied(value: Any) -> Any:
    """A copy; of a tensor in parts, of this rank's."""
    own = value.to_local() if is_dtensor(value) else value
    return own.detach().clone() if isinstance(own, torch.Tensor) else copy.deepcopy(own)


class Job:
    """A model with dropout, statistics and momentum, and what follows it, as a script has it before its run."""

    def __init__(self, world: World | None = None) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        inner: nn.Module = nn.Sequential(*layers)
        self.model = inner if world is None else world.wrap(inner)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.ema = EMA(self.model)
        self.schedule = Schedule(lambda step: 0.9**step, self.optimizer)
        self.trainer = create_supervised_trainer(
            self.model, self.optimizer, F.cross_entropy, scheduler=self.schedule, ema=self.ema
        )

    def everything(self) -> Any:
        """All that a finder could have changed."""
        kept = {
            "model": dict(self.model.state_dict()),
            "gradients": {name: each.grad for name, each in self.model.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "ema": dict(self.ema.state_dict()),
            "schedule": self.schedule.state_dict(),
            "modes": [each.training for each in self.model.modules()],
            "iteration": self.trainer.state.iteration,
            "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
        }
        return tree_map(_copied, kept)


def dataset(samples: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 4, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


def sizes_of_batches(size: int) -> DataLoader[Any]:
    return DataLoader(dataset(64), batch_size=size, shuffle=True)


FINDERS: list[Callable[[Job, Any], Any]] = [
    lambda job, loader: LRFinder(job.optimizer, end=100.0, steps=30).run(job.trainer, loader),
    lambda job, loader: BatchSizeFinder(job.optimizer, start=2, most=8).run(job.trainer, sizes_of_batches),
]


@pytest.mark.parametrize("has_trained", [False, True])
@pytest.mark.parametrize("find", FINDERS, ids=["rate", "batch size"])
def test_nothing_is_changed_to_the_last_bit(find: Callable[[Job, Any], Any], has_trained: bool) -> None:
    job, generator = Job(), torch.Generator().manual_seed(9)
    loader = DataLoader(dataset(), batch_size=6, shuffle=True, generator=generator)
    if has_trained:
        job.trainer.run(loader, max_epochs=1)
        job.model[0].eval()  # type: ignore[index]
    before, drawn = job.everything(), generator.get_state()
    find(job, loader)
    assert same(job.everything(), before)
    assert torch.equal(generator.get_state(), drawn)


@pytest.mark.parametrize("find", FINDERS, ids=["rate", "batch size"])
def test_an_exception_in_a_trial_leaves_everything_as_it_was_too(find: Callable[[Job, Any], Any]) -> None:
    job = Job()
    step, calls = job.trainer.process_function, []

    def failing(engine: Engine, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the second step")
        return step(engine, batch)

    job.trainer.process_function = failing
    before = job.everything()
    with pytest.raises(RuntimeError, match="in the second step"):
        find(job, DataLoader(dataset(), batch_size=6))
    assert same(job.everything(), before)


# Learning rates


def quadratic(rate: float = 1.0) -> tuple[Engine, torch.optim.Optimizer]:
    """A loss of w * w, which a rate below 1 makes smaller and a larger one makes grow."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    trainer = create_supervised_trainer(model, optimizer, lambda p, y: p.square().mean())
    return trainer, optimizer


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    trainer, optimizer = quadratic()
    curve = LRFinder(optimizer, start=1e-4, end=100.0, steps=60, smoothing=0.0).run(trainer, [(torch.ones(2, 1), 0)])
    assert curve.suggestion is not None
    assert 0.02 < curve.suggestion < 1.0
    assert curve.losses[0] == 1.0
    assert curve.rates[0] == pytest.approx(1e-4)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_loss_that_diverges_ends_the_trial() -> None:
    trainer, optimizer = quadratic()
    curve = LRFinder(optimizer, start=1e-4, end=1e6, steps=100, smoothing=0.0).run(trainer, [(torch.ones(2, 1), 0)])
    assert len(curve.rates) == len(curve.losses) < 100
    assert curve.losses[-1] > 4 * min(curve.losses)


def test_rates_of_further_groups_keep_their_ratio() -> None:
    first, second = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.2}, {"params": [second], "lr": 0.1}])
    seen: list[float] = []

    def step(engine: Engine, batch: Any) -> dict[str, float]:
        seen.append(optimizer.param_groups[0]["lr"] / optimizer.param_groups[1]["lr"])
        return {"loss": 1.0}

    trainer = Engine(step)
    trainer.modules.append(nn.ParameterList([first, second]))
    LRFinder(optimizer, steps=3).run(trainer, [torch.zeros(1)])
    assert seen == pytest.approx([2.0] * 3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]


def test_accumulated_iterations_have_one_rate(tmp_path: Any) -> None:
    trainer, optimizer = quadratic()
    seen: list[float] = []
    step = trainer.process_function
    grouped = Engine(lambda e, b: (seen.append(optimizer.param_groups[0]["lr"]), step(e, b))[1], accumulate=2)
    grouped.modules.extend(trainer.modules)
    curve = LRFinder(optimizer, end=0.1, steps=3).run(grouped, [(torch.ones(2, 1), 0)] * 2)
    assert seen == pytest.approx([rate for rate in curve.rates for _ in range(2)])
    curve.save(tmp_path / "curve.svg")
    assert ElementTree.parse(tmp_path / "curve.svg").getroot().tag.endswith("svg")


def test_epochs_that_cut_groups_short_do_not_make_more_steps() -> None:
    trainer, optimizer = quadratic()
    grouped = Engine(trainer.process_function, accumulate=2)
    grouped.modules.extend(trainer.modules)
    curve = LRFinder(optimizer, end=0.1, steps=3).run(grouped, [(torch.ones(2, 1), 0)])
    assert len(curve.losses) == len(curve.rates) == 3


def test_data_that_can_be_read_once_is_refused() -> None:
    trainer, optimizer = quadratic()
    with pytest.raises(ArgumentError, match="read only once"):
        LRFinder(optimizer).run(trainer, iter([(torch.ones(2, 1), 0)]))


def test_an_output_without_a_loss_is_refused_with_the_remedy() -> None:
    trainer = Engine(lambda engine, batch: "text")
    trainer.modules.append(nn.Linear(1, 1))
    with pytest.raises(ArgumentTypeError, match=r"LRFinder\(loss="):
        LRFinder(torch.optim.SGD(trainer.modules[0].parameters())).run(trainer, [torch.zeros(1)])


def test_a_trainer_that_knows_no_module_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    with pytest.raises(ArgumentError, match=r"append it to trainer\.modules"):
        LRFinder(optimizer).run(Engine(lambda engine, batch: 1.0), [torch.zeros(1)])


@pytest.mark.parametrize(
    ("finder", "arguments", "text"),
    [
        (LRFinder, {"start": 1.0, "end": 0.1}, "start is 1.0"),
        (LRFinder, {"steps": 1}, "steps is 1"),
        (LRFinder, {"diverges": 1.0}, "diverges is 1.0"),
        (LRFinder, {"smoothing": 1.0}, "smoothing is 1.0"),
        (BatchSizeFinder, {"start": 0}, "start is 0"),
        (BatchSizeFinder, {"start": 9, "most": 8}, "start is 9"),
        (BatchSizeFinder, {"halvings": -1}, "halvings is -1"),
    ],
)
def test_wrong_arguments_are_named(finder: Any, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        finder(quadratic()[1], **arguments)


# Batch sizes


def bounded(job: Job, most: int) -> None:
    """Have the step run out of memory above a size."""
    step = job.trainer.process_function

    def limited(engine: Engine, batch: Any) -> Any:
        if len(batch[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(engine, batch)

    job.trainer.process_function = limited


def test_sizes_are_doubled_and_then_halved_between() -> None:
    job = Job()
    bounded(job, 11)
    found = BatchSizeFinder(job.optimizer, start=2, halvings=2).run(job.trainer, sizes_of_batches)
    assert list(found.throughput) == [2, 4, 8, 10]
    assert (found.largest, found.too_large) == (10, 12)
    assert found.fastest in found.throughput
    assert ElementTree.fromstring(found.svg()).tag.endswith("svg")


def test_no_larger_size_is_tried_than_the_data_or_the_user_has() -> None:
    job = Job()
    assert BatchSizeFinder(job.optimizer, start=2, most=6).run(job.trainer, sizes_of_batches).largest == 6
    assert (
        BatchSizeFinder(job.optimizer, start=2).run(job.trainer, sizes_of_batches).largest == 32
    )  # of 64 samples, 2 batches


def test_a_batch_that_cannot_be_read_for_want_of_memory_does_not_fit() -> None:
    def collate(samples: list[Any]) -> Any:
        if len(samples) > 5:
            raise MemoryError("cannot allocate memory for thread-local data")
        return torch.utils.data.default_collate(samples)

    job = Job()
    found = BatchSizeFinder(job.optimizer, start=2).run(
        job.trainer, lambda size: DataLoader(dataset(64), batch_size=size, collate_fn=collate)
    )
    assert (list(found.throughput), found.too_large) == ([2, 4, 5], 6)


def test_a_first_size_that_does_not_fit_is_an_error() -> None:
    job = Job()
    bounded(job, 2)
    with pytest.raises(EngineError, match="a batch of 4 does not fit into memory on rank 0"):
        BatchSizeFinder(job.optimizer, start=4).run(job.trainer, sizes_of_batches)


# Ranks


def _found_then_trained(world: World, finds: bool) -> tuple[Any, Any, Any]:
    job = Job(world)
    world.seed_everything(1, per_rank=True)
    loader = world.loader(dataset(48), global_batch_size=12, shuffle=True)
    sizes = curve = None
    if finds:
        curve = LRFinder(job.optimizer, end=1e4, steps=30).run(job.trainer, loader)
        step = job.trainer.process_function
        bounded(job, 5 + 4 * world.rank)
        found = BatchSizeFinder(job.optimizer, start=2).run(
            job.trainer, lambda size: world.loader(dataset(96), batch_size=size, shuffle=True)
        )
        sizes = list(found.throughput), found.too_large
        job.trainer.process_function = step
    order: list[Any] = []
    job.trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: order.append(e.state.batch[0].clone()))
    job.trainer.run(loader, max_epochs=2)
    return job.model.state_dict(), order, (curve, sizes)


@pytest.mark.slow
def test_ranks_agree_and_train_afterwards_as_if_nothing_had_been() -> None:
    plain = run_ranks(_found_then_trained, 2, False)
    found = run_ranks(_found_then_trained, 2, True)
    for (model, order, _), (other, other_order, _) in zip(plain, found, strict=True):
        assert same(dict(model), dict(other))
        assert same(order, other_order)
    (_, _, (curve, sizes)), (_, _, (other_curve, other_sizes)) = found
    assert sizes == other_sizes == ([2, 4, 5], 6)  # what fits on the smaller rank
    assert curve == other_curve
    assert 2 < len(curve.losses) <= 30


def _found_in_parts(world: World) -> tuple[list[bool], Any, str]:
    """Whether this rank's parts are as before, behind each finder; the curve; and what the second says."""

    job = Job(world)
    loader = world.loader(dataset(48), global_batch_size=12, shuffle=True)
    job.trainer.run(loader, max_epochs=1)
    before = job.everything()
    curve = LRFinder(job.optimizer, end=1e4, steps=30).run(job.trainer, loader)
    unchanged = same(job.everything(), before)
    with pytest.raises(ArgumentError) as refused:
        BatchSizeFinder(job.optimizer).run(job.trainer, lambda size: world.loader(dataset(96), batch_size=size))
    return [unchanged, same(job.everything(), before)], curve, str(refused.value)


@pytest.mark.slow
def test_a_sharded_model_is_unchanged_and_its_batch_sizes_are_refused() -> None:
    first, second = run_ranks(_found_in_parts, 2, env={"ALLSTEP_MESH": "shard=2"})
    assert first == second
    assert first[0] == [True, True]
    assert 2 < len(first[1].losses) <= 30
    assert "sharded over ranks" in first[2]


def _started(world: World, folder: str, finds: bool, kill_at: int | None) -> tuple[Any, list[Any], float | None]:
    """A script that looks for settings at each start, before and after it loads its checkpoint."""
    job = Job(world)
    world.seed_everything(1, per_rank=True)
    loader = world.loader(dataset(48), global_batch_size=12, shuffle=True)
    EarlyStopping(100, lambda engine: 0.0, job.trainer).attach(job.trainer, Events.EPOCH_COMPLETED)
    best = SaveBest(f"{folder}/best", {"model": job.model}, "loss", "min").attach(job.trainer)
    track = Track(f"{folder}/track", every=1, loss="loss").attach(job.trainer)
    checkpoint = Checkpoint(f"{folder}/run", every=2).attach(job.trainer)

    def find() -> None:
        if finds:
            LRFinder(job.optimizer, steps=5).run(job.trainer, loader)
            BatchSizeFinder(job.optimizer, start=2, most=4).run(
                job.trainer, lambda size: world.loader(dataset(96), batch_size=size, shuffle=True)
            )

    @job.trainer.on(Events.ITERATION_COMPLETED)
    def maybe_die(engine: Engine) -> None:
        if engine.state.iteration == kill_at:
            raise Killed

    find()
    checkpoint.resume()
    find()
    try:
        job.trainer.run(loader, max_epochs=3)
    except Killed:
        checkpoint.close()
    track.close()
    lines = [json.loads(line) for line in track.journal.read_text().splitlines()] if world.is_main else []
    told = [{name: value for name, value in line.items() if name != "time"} for line in lines]
    return {name: each.clone() for name, each in job.model.state_dict().items()}, told, best.best


@pytest.mark.slow
def test_a_killed_run_that_looks_again_ends_as_one_that_never_did(tmp_path: Path) -> None:
    whole = run_ranks(_started, 2, str(tmp_path / "whole"), False, None)
    run_ranks(_started, 2, str(tmp_path / "killed"), True, 7)
    resumed = run_ranks(_started, 2, str(tmp_path / "killed"), True, None)
    assert same(whole, resumed)
    assert [line["step"] for line in resumed[0][1] if "loss" in line] == list(range(1, 13))


def _found_in_real_memory(world: World) -> tuple[list[int], int | None]:
    job = Job(world)
    if world.rank == 1:  # 300 MB more than it has now
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 300 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    step = job.trainer.process_function

    def greedy(engine: Engine, batch: Any) -> Any:
        kept = torch.ones(len(batch[0]), 2**22)  # 16 MB a sample
        return step(engine, (batch[0] * kept[:, :1], batch[1]))

    job.trainer.process_function = greedy
    found = BatchSizeFinder(job.optimizer, start=2, most=64).run(
        job.trainer, lambda size: world.loader(dataset(384), batch_size=size)
    )
    return list(found.throughput), found.too_large


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="a limit of memory is set by what Linux tells")
def test_a_rank_with_less_memory_than_the_other_decides_for_both() -> None:
    (sizes, too_large), other = run_ranks(_found_in_real_memory, 2)
    assert other == (sizes, too_large)
    assert too_large is not None
    assert max(sizes) < too_large <= 20
