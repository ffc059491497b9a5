"""The adversarial trainer: what an iteration trains, alone and over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from allstep import Alone, Checkpoint, Engine, Events, World
from allstep.errors import ArgumentError, ParallelError
from allstep.testing import run_ranks
from allstep.trainers import create_adversarial_trainer
from tests.regression import Killed, same


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return generator, nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def latent(real: torch.Tensor) -> torch.Tensor:
    """The same for the same samples, so that runs can be compared."""
    return real[:, :2].cos()


def optimizers(generator: nn.Module, discriminator: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    return torch.optim.SGD(generator.parameters(), lr=0.1), torch.optim.SGD(discriminator.parameters(), lr=0.1)


def trainer_of(generator: nn.Module, discriminator: nn.Module, **options: Any) -> Engine:
    return create_adversarial_trainer(
        generator, discriminator, *optimizers(generator, discriminator), latent, **({"coordinator": Alone()} | options)
    )


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, generator=generator) for _ in range(3)]


def test_it_trains_as_a_step_written_by_hand_to_the_last_bit() -> None:
    generator, discriminator = networks()
    ours, theirs = optimizers(generator, discriminator)
    for real in batches():
        fake = generator(latent(real))
        scores = discriminator(torch.cat([real, fake.detach()]))
        loss = F.binary_cross_entropy_with_logits(scores[:6], torch.ones(6, 1))
        loss = loss + F.binary_cross_entropy_with_logits(scores[6:], torch.zeros(6, 1))
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        ours.zero_grad()
        F.binary_cross_entropy_with_logits(discriminator(fake), torch.ones(6, 1)).backward()
        ours.step()
    other = networks()
    output = trainer_of(*other).run(batches()).output
    assert same(dict(other[0].state_dict()), dict(generator.state_dict()))
    assert same(dict(other[1].state_dict()), dict(discriminator.state_dict()))
    assert list(output) == ["generator", "discriminator"]
    assert not any(each.requires_grad for each in output.values())
    assert all(each.requires_grad for each in other[1].parameters())


def test_losses_and_batches_of_ones_own_may_be_given() -> None:
    trainer = trainer_of(
        *networks(),
        generator_loss=lambda of_fake: -of_fake.mean(),
        discriminator_loss=lambda of_real, of_fake: of_fake.mean() - of_real.mean(),
        prepare_batch=lambda batch, device, non_blocking: batch["image"],
        clip_norm=1.0,
        precision="bf16",
    )
    output = trainer.run([{"image": each} for each in batches()]).output
    assert output["discriminator"].dtype is torch.bfloat16


def test_the_first_thing_in_a_batch_is_real_by_default() -> None:
    pairs = [(each, torch.zeros(6)) for each in batches()]
    one, other = networks(), networks()
    trainer_of(*one).run(pairs)
    trainer_of(*other).run(batches())
    assert same(dict(one[0].state_dict()), dict(other[0].state_dict()))


def test_all_that_it_trains_is_saved_with_it() -> None:
    names = ["generator", "discriminator", "generator_optimizer", "discriminator_optimizer"]
    scalers = ["discriminator_scaler", "generator_scaler"]
    assert list(trainer_of(*networks(), precision="fp16").extension.states) == names + scalers


def test_wrong_options_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"max_norm is 0\.0"):
        trainer_of(*networks(), clip_norm=0.0)
    with pytest.raises(ParallelError, match="fp8"):
        trainer_of(*networks(), precision="fp8")


def _trained(world: World, uneven: bool) -> tuple[Any, int]:
    generator, discriminator = (world.wrap(each) for each in networks())
    trainer = trainer_of(generator, discriminator, coordinator=None)
    data = [each[world.rank :: world.world_size] for each in batches()]
    state = trainer.run(data[: 2 if uneven and world.rank else 3], uneven="longest")
    parameters = [dict(world.unwrap(each).named_parameters()) for each in (generator, discriminator)]
    return [{name: each.detach() for name, each in of.items()} for of in parameters], state.iteration


@pytest.mark.slow
def test_ranks_train_one_generator_and_one_discriminator_also_over_uneven_data() -> None:
    (first, iterations), (second, _) = run_ranks(_trained, 2, True)
    assert iterations == 3
    assert same(first, second)


def _gone_on(world: World, folder: str, kill_at: int | None) -> Any:
    generator, discriminator = (world.wrap(each) for each in networks())
    trainer = trainer_of(generator, discriminator, coordinator=None)
    checkpoint = Checkpoint(folder, every=1).attach(trainer)
    checkpoint.resume()

    @trainer.on(Events.ITERATION_COMPLETED)
    def maybe_die(engine: Engine) -> None:
        if engine.state.iteration == kill_at:
            raise Killed

    try:
        trainer.run([each[world.rank :: world.world_size] for each in batches()], max_epochs=2)
    except Killed:
        checkpoint.close()
    return [dict(world.unwrap(each).state_dict()) for each in (generator, discriminator)]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_last_bit_with_what_the_trainer_had_saved(tmp_path: Path) -> None:
    whole = run_ranks(_gone_on, 2, str(tmp_path / "whole"), None)
    run_ranks(_gone_on, 2, str(tmp_path / "killed"), 4)
    assert same(run_ranks(_gone_on, 2, str(tmp_path / "killed"), None), whole)
