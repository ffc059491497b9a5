"""A ready engine for adversarial networks: two models, two optimizers, trained against each other.

After Goodfellow et al., "Generative Adversarial Nets", 2014, algorithm 1 with k = 1.

Contract: each iteration trains the discriminator on a batch and on what the generator makes beside it, in one forward
pass, and then the generator by what the discriminator says of that. There the discriminator's parameters need no
gradient, and the module inside DDP is called, so that nothing of it is reduced. Both losses are means over samples and
are weighed by `state.weight`. The optimizers step in every iteration: gradients are not accumulated, because the
generator's depend on the discriminator's last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from allstep.coordination import Coordinator
from allstep.engine import Engine
from allstep.handlers import GradientClipping
from allstep.parallel import Precision, autocast, grad_scaler, unwrap
from allstep.trainers.step_parts import device_for, save_with, scaled_step
from allstep.world import to_device

PrepareReal: TypeAlias = Callable[[Any, torch.device, bool], torch.Tensor]
DiscriminatorLoss: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def prepare_real(batch: Any, device: torch.device, non_blocking: bool) -> torch.Tensor:
    """The default `prepare_batch`: a tensor of real samples, or the first thing in the batch, moved to the device."""
    real = batch[0] if isinstance(batch, list | tuple) else batch
    moved: torch.Tensor = to_device(real, device, non_blocking=non_blocking)
    return moved


def real_or_fake(of_real: torch.Tensor, of_fake: torch.Tensor) -> torch.Tensor:
    """The default loss of the discriminator: binary cross-entropy of its logits."""
    real = F.binary_cross_entropy_with_logits(of_real, torch.ones_like(of_real))
    return real + F.binary_cross_entropy_with_logits(of_fake, torch.zeros_like(of_fake))


def taken_for_real(of_fake: torch.Tensor) -> torch.Tensor:
    """The default loss of the generator: it is the smaller, the more the discriminator takes its samples for real."""
    return F.binary_cross_entropy_with_logits(of_fake, torch.ones_like(of_fake))


def create_adversarial_trainer(
    generator: nn.Module,
    discriminator: nn.Module,
    generator_optimizer: Optimizer,
    discriminator_optimizer: Optimizer,
    latent: Callable[[torch.Tensor], Any],
    *,
    generator_loss: Callable[[torch.Tensor], torch.Tensor] = taken_for_real,
    discriminator_loss: DiscriminatorLoss = real_or_fake,
    device: torch.device | str | None = None,
    non_blocking: bool = True,
    prepare_batch: PrepareReal = prepare_real,
    precision: Precision = "no",
    clip_norm: float | None = None,
    samples_in: Callable[[Any], int] | None = None,
    coordinator: Coordinator | None = None,
) -> Engine:
    """An engine that trains a generator against a discriminator.

    Its output is {"generator": loss, "discriminator": loss}, detached and unweighted. To step by a schedule, or to
    average the generator's weights, attach a `Schedule` and an `EMA`.

    Args:
        generator: from latent values to samples; wrapped or not.
        discriminator: from samples to logits, more than 0 for real; wrapped or not.
        generator_optimizer: of the generator's parameters alone.
        discriminator_optimizer: of the discriminator's parameters alone.
        latent: `real -> z`, new random values for as many samples as `real` has, on its device.
        generator_loss: `of_fake -> loss`, a mean over samples.
        discriminator_loss: `(of_real, of_fake) -> loss`, a mean over samples.
        device: where batches go; by default the current world's device, else the generator's.
        non_blocking: copy from pinned memory without waiting.
        prepare_batch: `(batch, device, non_blocking) -> real`.
        precision: "no", "fp16" or "bf16", as in `create_supervised_trainer`. With "fp16" each network has a GradScaler
            of its own.
        clip_norm: the largest norm of the gradients of each network's step.
        samples_in: `batch -> int`, how many samples a batch has; by default rows.
        coordinator: how ranks agree; by default the current world's.

    Raises:
        ArgumentError: clip_norm is not above 0.
        ParallelError: an unknown precision.
    """
    target = device_for(generator, device)
    judge = unwrap(discriminator)
    scalers = [grad_scaler(target.type, precision) for _ in range(2)]

    def cast() -> AbstractContextManager[object]:
        return autocast(target.type, precision)

    def descend(loss: torch.Tensor, weight: float, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
        optimizer.zero_grad()
        scaler.scale(loss * weight).backward()  # type: ignore[no-untyped-call]
        scaled_step(scaler, optimizer)

    def step(engine: Engine, batch: Any) -> dict[str, torch.Tensor]:
        weight = engine.state.weight
        generator.train()
        discriminator.train()
        real = prepare_batch(batch, target, non_blocking)
        with cast():
            fake = generator(latent(real))
            # One forward pass: DDP would change the buffers that a first one has used at the beginning of a second.
            scores = discriminator(torch.cat([real, fake.detach()]))
            of_discriminator = discriminator_loss(*scores.split([len(real), len(fake)]))
        descend(of_discriminator, weight, discriminator_optimizer, scalers[0])
        with _frozen(judge):
            with cast():
                of_generator = generator_loss(judge(fake))
            descend(of_generator, weight, generator_optimizer, scalers[1])
        return {"generator": of_generator.detach(), "discriminator": of_discriminator.detach()}

    trainer = Engine(step, coordinator=coordinator, samples_in=samples_in, name="adversarial trainer")
    trainer.modules.extend([generator, discriminator])
    save_with(trainer, generator=generator, discriminator=discriminator)
    save_with(trainer, generator_optimizer=generator_optimizer, discriminator_optimizer=discriminator_optimizer)
    if precision == "fp16":
        save_with(trainer, discriminator_scaler=scalers[0], generator_scaler=scalers[1])
    if clip_norm is not None:
        for optimizer in (generator_optimizer, discriminator_optimizer):
            GradientClipping(optimizer, clip_norm).attach(trainer)
    return trainer


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Gradients go through the module and not into its parameters."""
    required = [each for each in module.parameters() if each.requires_grad]
    for each in required:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in required:
            each.requires_grad_(True)
