from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from allstep import EMA, Schedule
from allstep.engine import Engine, Events
from allstep.errors import ArgumentError, ParallelError
from allstep.trainers import create_supervised_evaluator, create_supervised_trainer
from tests.docs.pages import DOCS, blocks

Batch = tuple[torch.Tensor, torch.Tensor]


def model_and_optimizer(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batches(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(parameters(one), parameters(other), strict=True):
        assert torch.equal(a, b)


def train(data: list[Batch], epochs: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    model, optimizer = model_and_optimizer(dtype)
    create_supervised_trainer(model, optimizer, functional.cross_entropy, **options).run(data, max_epochs=epochs)
    return model


def test_the_trainer_equals_a_hand_written_loop_to_the_last_bit() -> None:
    data = batches(5, 5, 3)
    model, optimizer = model_and_optimizer()
    for _ in range(2):
        for x, y in data:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert_same_bits(train(data), model)


def test_bf16_computes_in_bf16_and_keeps_the_parameters_dtype() -> None:
    seen: list[torch.dtype] = []
    model, optimizer = model_and_optimizer()
    trainer = create_supervised_trainer(
        model,
        optimizer,
        functional.cross_entropy,
        precision="bf16",
        output_transform=lambda x, y, y_pred, loss: seen.append(y_pred.dtype),
    )
    trainer.run(batches(5, 5))
    assert seen == [torch.bfloat16] * 2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not hasattr(trainer.state, "scaler")


def test_fp16_scales_the_loss_and_unscales_the_step() -> None:
    model, optimizer = model_and_optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    trainer = create_supervised_trainer(model, optimizer, functional.cross_entropy, precision="fp16", scaler=scaler)
    gradients: list[float] = []
    model[0].weight.register_hook(lambda gradient: gradients.append(float(gradient.abs().max())))
    trainer.run(batches(5, 5), max_epochs=5)
    assert trainer.state.scaler is scaler  # type: ignore[attr-defined]
    assert max(gradients) > 1.0
    for a, b in zip(parameters(model), parameters(train(batches(5, 5), epochs=5)), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_fp16_leaves_out_a_step_with_a_gradient_that_overflowed() -> None:
    model, optimizer = model_and_optimizer()
    before = parameters(model)
    trainer = create_supervised_trainer(
        model, optimizer, lambda y_pred, y: functional.cross_entropy(y_pred, y) * torch.inf, precision="fp16"
    )
    scale = trainer.state.scaler.get_scale()  # type: ignore[attr-defined]
    trainer.run(batches(5))
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))
    assert trainer.state.scaler.get_scale() < scale  # type: ignore[attr-defined]


def test_an_unknown_precision_is_refused() -> None:
    model, optimizer = model_and_optimizer()
    with pytest.raises(ParallelError, match="fp8"):
        create_supervised_trainer(model, optimizer, functional.cross_entropy, precision="fp8")  # type: ignore[arg-type]


def test_accumulated_batches_train_as_one_large_batch_also_uneven_ones() -> None:
    double = {"dtype": torch.float64}
    small = batches(4, 1, 3, 2, 2, **double)
    large = [tuple(torch.cat(parts) for parts in zip(*small[at : at + 2], strict=True)) for at in (0, 2, 4)]
    one = train(small, gradient_accumulation_steps=2, **double)
    other = train(large, **double)  # type: ignore[arg-type]
    for a, b in zip(parameters(one), parameters(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_optimizer_steps_once_a_group() -> None:
    model, optimizer = model_and_optimizer()
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(trainer.state.iteration))
    trainer = create_supervised_trainer(model, optimizer, functional.cross_entropy, gradient_accumulation_steps=2)
    trainer.run(batches(2, 2, 2), max_epochs=2)
    assert steps == [2, 3, 5, 6]


def test_an_epoch_cut_inside_a_group_ends_with_its_optimizer_step() -> None:
    model, optimizer = model_and_optimizer()
    trainer = create_supervised_trainer(model, optimizer, functional.cross_entropy, gradient_accumulation_steps=2)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), trainer.terminate_epoch)
    data = batches(2, 2, 1, 1)
    trainer.run(data)
    assert_same_bits(model, train(data[:2], epochs=1, gradient_accumulation_steps=2))


def test_the_default_output_is_the_detached_loss_before_weighing() -> None:
    model, optimizer = model_and_optimizer()
    outputs: list[Any] = []
    trainer = create_supervised_trainer(model, optimizer, functional.cross_entropy, gradient_accumulation_steps=2)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(e.state.output))
    data = batches(3, 1)
    expected = [functional.cross_entropy(model(x), y) for x, y in data]
    trainer.run(data)
    assert all(isinstance(output, torch.Tensor) and not output.requires_grad for output in outputs)
    assert torch.equal(torch.stack(outputs), torch.stack(expected))


def test_neither_engine_reads_a_value_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: torch.Tensor, *args: Any) -> Any:
        raise AssertionError("the host waited for a tensor's value")

    model, optimizer = model_and_optimizer()
    trainer = create_supervised_trainer(model, optimizer, functional.cross_entropy, gradient_accumulation_steps=2)
    evaluator = create_supervised_evaluator(model)
    data = batches(4, 4, 3)
    with monkeypatch.context() as patch:
        for name in ("item", "__bool__", "__float__", "__int__", "tolist", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        trainer.run(data)
        evaluator.run(data)


def test_output_transform_is_given_input_target_prediction_and_loss() -> None:
    model, optimizer = model_and_optimizer()
    trainer = create_supervised_trainer(
        model, optimizer, functional.cross_entropy, output_transform=lambda *given: given
    )
    ((x, y),) = batches(3)
    given = trainer.run([(x, y)]).output
    assert given[0] is x
    assert given[1] is y
    assert given[2].shape == (3, 3)
    assert torch.equal(given[3], functional.cross_entropy(given[2], y).detach())


def test_model_fn_model_transform_and_prepare_batch_are_used() -> None:
    model, optimizer = model_and_optimizer()
    calls: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (calls.append(name), function(*given))[1]

    options: dict[str, Any] = {
        "prepare_batch": noting("prepare", lambda batch, device, non_blocking: (batch["x"], batch["y"])),
        "model_fn": noting("call", lambda model, x: {"logits": model(x)}),
        "model_transform": noting("transform", lambda output: output["logits"]),
    }
    ((x, y),) = batches(3)
    create_supervised_trainer(model, optimizer, functional.cross_entropy, **options).run([{"x": x, "y": y}])
    create_supervised_evaluator(model, **options).run([{"x": x, "y": y}])
    assert calls == ["prepare", "call", "transform"] * 2


def test_the_evaluator_computes_in_evaluation_mode_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9))
    data = batches(6)
    y_pred, y = create_supervised_evaluator(model).run(data).output
    assert not model.training
    assert not y_pred.requires_grad
    assert torch.equal(y_pred, model[0](data[0][0]))
    assert y is data[0][1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_trainer_puts_the_model_back_into_training_mode() -> None:
    model, optimizer = model_and_optimizer()
    modes: list[bool] = []
    trainer = create_supervised_trainer(model, optimizer, functional.cross_entropy)
    evaluator = create_supervised_evaluator(model)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(batches(2)))
    for engine in (trainer, evaluator):
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: modes.append(model.training))
    trainer.run(batches(2), max_epochs=2)
    assert modes == [True, False, True, False]


def test_the_evaluator_in_bf16_predicts_in_bf16() -> None:
    model, _ = model_and_optimizer()
    y_pred, _ = create_supervised_evaluator(model, precision="bf16").run(batches(2)).output
    assert y_pred.dtype == torch.bfloat16


def test_both_are_engines() -> None:
    model, optimizer = model_and_optimizer()
    assert type(create_supervised_trainer(model, optimizer, functional.cross_entropy)) is Engine
    assert type(create_supervised_evaluator(model)) is Engine


def test_clipping_a_schedule_and_an_average_are_options() -> None:
    data = batches(5, 5, 3, 4)
    model, optimizer = model_and_optimizer()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for x, y in data:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
        averaged.update_parameters(model)
    other, other_optimizer = model_and_optimizer()
    ema = EMA(other, 0.9)
    trainer = create_supervised_trainer(
        other,
        other_optimizer,
        functional.cross_entropy,
        clip_norm=0.1,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(other_optimizer, 0.5),
        ema=ema,
    )
    trainer.run(data)
    assert_same_bits(model, other)
    assert_same_bits(averaged, ema)
    assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.1 * 0.5**4


def test_a_schedule_that_was_made_is_attached_as_it_is() -> None:
    model, optimizer = model_and_optimizer()
    schedule = Schedule(lambda step: 0.5**step, optimizer, warm_up=1)
    create_supervised_trainer(model, optimizer, functional.cross_entropy, scheduler=schedule).run(batches(2, 2))
    assert schedule.rates == [0.05]


def test_gradients_values_may_be_clipped() -> None:
    model, optimizer = model_and_optimizer()
    before = parameters(model)
    create_supervised_trainer(model, optimizer, functional.cross_entropy, clip_value=1e-3).run(batches(5))
    for now, then in zip(parameters(model), before, strict=True):
        assert float((now - then).abs().max()) <= 1.01e-4  # a rate of 0.1


def two_losses(y_pred: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"entropy": functional.cross_entropy(y_pred, y), "size": y_pred.square().mean()}


def test_of_losses_by_name_the_sum_is_trained_and_all_are_shown() -> None:
    data = batches(5, 3)
    model, optimizer = model_and_optimizer()
    trainer = create_supervised_trainer(model, optimizer, two_losses)
    shown = trainer.run(data).output
    other, other_optimizer = model_and_optimizer()
    create_supervised_trainer(other, other_optimizer, lambda p, y: sum(two_losses(p, y).values())).run(data)
    assert_same_bits(model, other)
    assert list(shown) == ["entropy", "size", "loss"]
    assert not any(each.requires_grad for each in shown.values())
    assert torch.equal(shown["loss"], shown["entropy"] + shown["size"])


@pytest.mark.parametrize("names", [[], ["loss", "size"]])
def test_losses_without_a_name_of_their_own_are_refused(names: list[str]) -> None:
    model, optimizer = model_and_optimizer()
    trainer = create_supervised_trainer(model, optimizer, lambda p, y: {name: p.mean() for name in names})
    with pytest.raises(ArgumentError, match="other than 'loss'"):
        trainer.run(batches(2))


def test_what_the_trainer_was_given_is_saved_with_it() -> None:
    model, optimizer = model_and_optimizer()
    ema = EMA(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    trainer = create_supervised_trainer(
        model, optimizer, functional.cross_entropy, precision="fp16", scheduler=scheduler, ema=ema
    )
    assert list(trainer.extension.states) == ["model", "optimizer", "scaler", "Schedule", "EMA"]
    assert trainer.extension.states["model"] is model


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"clip_norm": 1.0, "clip_value": 1.0}, ValueError, "give one"),
        ({"scheduler": 3}, TypeError, "scheduler is 3"),
        ({"ema": 0.9}, TypeError, "ema is 0.9"),
    ],
)
def test_options_that_cannot_be_meant_are_named(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        create_supervised_trainer(*model_and_optimizer(), functional.cross_entropy, **options)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_compiled_model_trains_and_evaluates_as_it_does_without() -> None:
    data = batches(5, 5)
    how = {"backend": "eager"}
    plain, model = train(data), train(data, compile=how)
    assert_same_bits(plain, model)
    compiled = create_supervised_evaluator(model, compile=how).run(data).output[0]
    assert torch.equal(compiled, create_supervised_evaluator(plain).run(data).output[0])


def test_a_typical_script_with_all_of_it_has_twenty_lines() -> None:
    script = next(block for block in blocks(DOCS / "howto" / "recipes.md") if block.is_script)
    assert "create_supervised_trainer(model, optimizer" in script.text
    assert len([line for line in script.text.splitlines() if line.strip()]) <= 20
