"""Engines of this package over ranks: `ignite.distributed` in a World, uneven data, ends that one rank asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from ignite.handlers import EpochOutputStore
from ignite.metrics import Accuracy, Average, RunningAverage
from ignite.metrics.metric import BatchWise
from torch import nn

from allstep import init
from allstep.errors import RanksError
from allstep.ignite import Engine, Events, create_supervised_evaluator
from allstep.testing import run_ranks


def at_home(world: Any) -> dict[str, Any]:
    """What Ignite says of the ranks inside a World, after it and in the next one."""
    engine = Engine(lambda engine, batch: None)
    engine.run(range(2))
    model = idist.auto_model(nn.Linear(2, 1))
    loader = idist.auto_dataloader(list(range(8)), batch_size=4)
    inside = (idist.get_rank(), idist.get_world_size(), idist.get_local_rank(), idist.all_reduce(1.0))
    said = {
        "inside": inside == (world.rank, world.world_size, world.rank, float(world.world_size)),
        "model": type(model).__name__,
        "batches": len(loader),
        "gathered": idist.all_gather(world.rank),
    }
    world.close()
    said["after"] = (idist.get_rank(), idist.get_world_size())
    return said


def test_ignites_ranks_are_those_of_the_world_until_it_is_closed() -> None:
    for said in run_ranks(at_home, 2):
        assert said == {
            "inside": True,
            "model": "DistributedDataParallel",
            "batches": 2,
            "gathered": [0, 1],
            "after": (0, 1),
        }


def under_parallel(world: Any, folder: Path) -> Any:
    """A script that has Ignite connect its ranks, and opens a World inside."""
    rank, ranks = world.rank, world.world_size
    world.close()

    def training(local_rank: int) -> Any:
        with pytest.warns(RuntimeWarning, match="2 ranks and no World is open"):
            Engine(lambda engine, batch: None).run(range(2))
        with init() as inner:
            iterations = Engine(lambda engine, batch: idist.all_reduce(1.0)).run(range(2 + rank)).iteration
            return inner.world_size, idist.get_world_size(), iterations

    idist.initialize("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        return training(rank)
    finally:
        idist.finalize()


def test_a_world_takes_over_the_ranks_that_ignite_has_connected(tmp_path: Path) -> None:
    assert run_ranks(under_parallel, 2, tmp_path) == [(2, 2, 2)] * 2


def uneven_evaluation(world: Any) -> tuple[float, int]:
    model = nn.Identity()
    data = [(torch.eye(2), torch.tensor([0, 1 - world.rank]))] * (3 if world.rank == 0 else 1)
    evaluator = create_supervised_evaluator(model, {"accuracy": Accuracy()})
    state = evaluator.run(data)
    return state.metrics["accuracy"], state.iteration


def test_an_evaluation_counts_every_sample_of_uneven_ranks_once() -> None:
    # Rank 0 is right in 6 of 6, rank 1 in 1 of 2.
    assert run_ranks(uneven_evaluation, 2) == [(7 / 8, 3)] * 2


def uneven_outputs(world: Any) -> tuple[int, dict[str, float]]:
    """An evaluation of three batches on rank 0 and of one on rank 1, with handlers that look at each output."""
    data = [(torch.eye(2), torch.tensor([0, 1 - world.rank]))] * (3 if world.rank == 0 else 1)
    evaluator = create_supervised_evaluator(nn.Identity(), {})
    outputs = EpochOutputStore(lambda output: len(output[0]))
    outputs.attach(evaluator)
    RunningAverage(Accuracy()).attach(evaluator, "accuracy")
    RunningAverage(output_transform=lambda output: float(len(output[1]))).attach(evaluator, "samples")
    Accuracy().attach(evaluator, "of_batch", usage=BatchWise())
    metrics = evaluator.run(data).metrics
    return len(outputs.data), {name: round(value, 3) for name, value in metrics.items()}


def test_a_rank_without_a_batch_is_no_output_to_handlers_and_no_hang() -> None:
    # Accuracies of the batches of both: 3/4, then 1 and 1, of rank 0 alone.
    wanted = {"accuracy": round(0.75 * 0.98**2 + 1 - 0.98**2, 3), "samples": 2.0, "of_batch": 1.0}
    assert run_ranks(uneven_outputs, 2) == [(3, wanted), (1, wanted)]


def average_of_fillers(world: Any) -> tuple[float, list[bool]]:
    heard: list[bool] = []
    trainer = Engine(lambda engine, batch: 3.0, uneven="longest")
    RunningAverage(output_transform=lambda output: output).attach(trainer, "loss")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: heard.append(engine.state.active))
    return trainer.run([1.0] * (3 - 2 * world.rank)).metrics["loss"], heard


def test_where_fillers_are_run_all_handlers_are_called_and_averages_go_on() -> None:
    assert run_ranks(average_of_fillers, 2) == [(3.0, [True] * 3), (3.0, [True, False, False])]


def one_asks(world: Any) -> tuple[int, Any]:
    trainer = Engine(lambda engine, batch: None)
    if world.rank == 1:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), trainer.terminate, False)
    state = trainer.run(range(500), window=1)
    return state.iteration, bool(trainer.should_terminate)


def test_an_end_that_one_rank_asks_for_is_that_of_all() -> None:
    first, second = run_ranks(one_asks, 2)
    assert first == second
    assert first[0] < 500
    assert first[1]


def swallowing(world: Any) -> None:
    trainer = Engine(lambda engine, batch: 1 / (batch - 2 * world.rank))
    trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: None)
    trainer.run([1, 1, 2, 1])


def test_an_exception_over_ranks_is_not_swallowed_since_the_others_wait() -> None:
    with pytest.raises(RanksError, match="ZeroDivisionError"):
        run_ranks(swallowing, 2)


def resumed_metric(world: Any) -> float:
    average = Average()
    engine = Engine(lambda engine, batch: float(batch))
    average.attach(engine, "average")
    return engine.run([world.rank, world.rank + 1.0]).metrics["average"]


def test_a_metric_is_over_the_samples_of_all_ranks() -> None:
    assert run_ranks(resumed_metric, 2) == [1.0, 1.0]


def test_a_world_of_one_needs_no_process_group() -> None:
    with init():
        assert Engine(lambda engine, batch: batch).run(range(3)).output == 2
        assert idist.get_world_size() == 1
