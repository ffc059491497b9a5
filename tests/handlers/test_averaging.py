"""EMA and SWA: what they average, the weights put into the model and out again, ranks, and resumed runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from allstep import EMA, SWA, Alone, Engine, Events, World, create_supervised_evaluator
from allstep.errors import ArgumentError, EngineError
from allstep.testing import SimulatedRank, run_ranks, simulate
from tests.handlers.resuming import Job, check_resumes_exactly, dataset, started, trained
from tests.regression import same


def counting(model: nn.Linear, **options: Any) -> Engine:
    """An engine whose step adds 1 to the model's weight, where an optimizer would step."""

    def step(engine: Engine, batch: Any) -> None:
        if engine.state.group_end:
            with torch.no_grad():
                model.weight += 1

    return Engine(step, **({"coordinator": Alone()} | options))


def linear() -> nn.Linear:
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    return model


def weight(averaged: Any) -> float:
    return float(averaged.module.weight)


def test_ema_averages_after_each_optimizer_step() -> None:
    model = linear()
    ema = EMA(model, 0.75)
    engine = counting(model, accumulate=2)
    ema.attach(engine)
    engine.run(range(6))
    assert weight(ema) == 0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 3
    assert float(ema(torch.ones(1)) - ema.module.bias) == weight(ema)


def test_ema_takes_another_event_with_a_filter() -> None:
    model = linear()
    ema, engine = EMA(model, 0.5), counting(model)
    ema.attach(engine, Events.OPTIMIZER_STEP_COMPLETED(every=3))
    engine.run(range(7))
    assert weight(ema) == 0.5 * 3 + 0.5 * 6


def test_the_warm_up_begins_with_a_smaller_decay() -> None:
    model = linear()
    ema, engine = EMA(model, 0.9, warm_up=True), counting(model)
    ema.attach(engine)
    engine.run(range(2))
    assert weight(ema) == pytest.approx(2 / 11 * 1 + 9 / 11 * 2)


def _ema_by_samples(coordinator: SimulatedRank, rows: int) -> float:
    model = linear()
    ema, engine = EMA(model, 0.5, batch_size=4), counting(model, coordinator=coordinator, name="trainer")
    ema.attach(engine)
    engine.run([torch.zeros(rows)] * 2)
    return weight(ema)


@pytest.mark.parametrize(("ranks", "rows", "stays"), [(1, 4, 0.5), (2, 2, 0.5), (2, 4, 0.25)])
def test_by_samples_a_larger_batch_decays_more(ranks: int, rows: int, stays: float) -> None:
    assert simulate(_ema_by_samples, ranks, rows) == [stays * 1 + (1 - stays) * 2] * ranks


@pytest.mark.parametrize(("buffers", "expected"), [("copy", 4.0), ("average", 3.0)])
def test_buffers_are_copied_or_averaged(buffers: Any, expected: float) -> None:
    model = nn.BatchNorm1d(1)
    ema = EMA(model, 0.5, buffers=buffers)
    for value in (2.0, 4.0):
        model.running_mean.fill_(value)
        ema.update_parameters(model)
    assert float(ema.module.running_mean) == expected


def test_applied_puts_the_average_in_and_the_weights_back() -> None:
    model = linear()
    ema, engine = EMA(model, 0.5), counting(model)
    ema.attach(engine)
    engine.run(range(2))
    before, tensor = {name: each.clone() for name, each in model.state_dict().items()}, model.weight
    with ema.applied():
        assert model.weight.item() == 1.5
        assert model.weight is tensor
    assert same(dict(model.state_dict()), before)
    assert weight(ema) == 1.5


def test_an_exception_in_applied_leaves_the_weights_as_they_were() -> None:
    model = linear()
    ema, engine = EMA(model, 0.5), counting(model)
    ema.attach(engine)
    engine.run(range(2))
    with pytest.raises(RuntimeError, match="in the body"), ema.applied():
        raise RuntimeError("in the body")
    assert (model.weight.item(), weight(ema)) == (2.0, 1.5)


def test_before_the_first_update_applied_keeps_the_models_own_weights() -> None:
    model = linear()
    ema = EMA(model)
    nn.init.constant_(model.weight, 5.0)
    with ema.applied():
        assert model.weight.item() == 5.0


def test_training_saving_and_applying_again_are_refused_inside_applied() -> None:
    model = linear()
    ema, engine = EMA(model), counting(model)
    ema.attach(engine)
    engine.run(range(2))
    with ema.applied():
        with pytest.raises(EngineError, match="cannot be trained"):
            engine.run(range(2))
        with pytest.raises(EngineError, match="cannot be saved"):
            ema.state_dict()
        with pytest.raises(EngineError, match="already"), ema.applied():
            pass


def test_swa_is_the_mean_of_the_weights_at_the_chosen_epochs_ends() -> None:
    model = linear()
    swa = SWA(model, start=2, every=2)
    engine = counting(model)
    swa.attach(engine)
    engine.run(range(1), max_epochs=7)
    assert int(swa.n_averaged) == 3
    assert weight(swa) == (2 + 4 + 6) / 3


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: EMA(linear(), 1.5), ValueError, "decay is 1.5"),
        (lambda: EMA(linear(), batch_size=0), ValueError, "batch_size is 0"),
        (lambda: EMA(linear(), buffers="no"), ValueError, "buffers is 'no'"),  # type: ignore[arg-type]
        (lambda: EMA(3), TypeError, "model is 3"),  # type: ignore[arg-type]
        (lambda: SWA(linear(), 0), ValueError, "start is 0"),
        (lambda: SWA(linear(), 1, every=0), ValueError, "every is 0"),
    ],
)
def test_wrong_arguments_are_named(make: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_samples_are_counted_at_optimizer_steps_only() -> None:
    with pytest.raises(ArgumentError, match="OPTIMIZER_STEP_COMPLETED"):
        EMA(linear(), batch_size=4).attach(counting(linear()), Events.EPOCH_COMPLETED)


# Over ranks


def ema_and_swa(job: Job) -> Mapping[str, Any]:
    ema = EMA(job.model, 0.9, warm_up=True, buffers="average").attach(job.trainer)
    return {"ema": ema, "swa": SWA(job.model, start=2).attach(job.trainer)}


def evaluated(world: World) -> Any:
    """Predictions of the averaged weights, by a model in DDP, and by the averages themselves; and the updated norm."""
    job = started(world)
    handlers = ema_and_swa(job)
    job.trainer.run(world.loader(dataset(), global_batch_size=6, shuffle=True), max_epochs=3)
    x, y = dataset().tensors
    own = create_supervised_evaluator(handlers["ema"]).run([(x, y)]).output[0]
    evaluator = create_supervised_evaluator(job.model)
    with handlers["ema"].applied():
        applied = evaluator.run([(x, y)]).output[0]
    handlers["swa"].update_batch_norm(world.loader(TensorDataset(x, y), global_batch_size=12, shuffle=False))
    norm = handlers["swa"].module[1]
    return own, applied, (norm.running_mean, int(norm.num_batches_tracked)), handlers["swa"](x)


@pytest.mark.slow
def test_all_ranks_evaluate_one_average(tmp_path: Path) -> None:
    (own, applied, norm, swa), second = run_ranks(evaluated, 2)
    assert same(second, (own, applied, norm, swa))
    assert torch.equal(own, applied)
    assert norm[1] == 6  # 3 batches on each rank, whose statistics are all in


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_averages(tmp_path: Path) -> None:
    first, _ = check_resumes_exactly(tmp_path, ema_and_swa, kill_at=9)
    ema = first["handlers"]["ema"]
    assert int(ema["n_averaged"]) == 18
    assert not torch.equal(ema["module.0.weight"], first["model"]["0.weight"])


@pytest.mark.slow
def test_a_run_with_fewer_ranks_goes_on_with_the_averages_of_more(tmp_path: Path) -> None:
    first, _ = run_ranks(partial(trained, batch_norm=False), 2, str(tmp_path / "two"), ema_and_swa)
    run_ranks(partial(trained, batch_norm=False, epochs=1), 2, str(tmp_path / "fewer"), ema_and_swa)
    (alone,) = run_ranks(partial(trained, batch_norm=False), 1, str(tmp_path / "fewer"), ema_and_swa)
    assert min(alone["rates"]) == 7
    torch.testing.assert_close(alone["handlers"], first["handlers"], rtol=1e-3, atol=1e-4)
