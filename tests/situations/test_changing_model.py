"""A model that changes under DDP: what is trained is what a single process trains, or one error says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allstep import Checkpoint, Engine, Events, World
from allstep.errors import DivergenceError, ModelChangedError, RanksError
from allstep.testing import run_ranks
from tests.situations import changing_models as models
from tests.situations.changing_models import (
    CHANGES,
    all_changes_over_ranks,
    freeze_first,
    over_ranks,
    plainly,
    unfreeze_first,
)


def test_a_layer_unfrozen_after_an_epoch_is_reduced(same_at_every_world_size):
    """Lightning-AI/pytorch-lightning#20340, facebookresearch/detectron2#2486."""
    same_at_every_world_size(over_ranks, plainly(unfreeze_first, freeze_first), unfreeze_first, freeze_first)


def test_a_change_after_an_epoch_trains_as_in_one_process(same_at_every_world_size):
    """JDAI-CV/fast-reid#178, NVIDIA/Megatron-LM#6087, pytorch/pytorch#104336."""
    expected = {name: plainly(change) for name, change in CHANGES.items()}
    assert len(expected) == 9
    same_at_every_world_size(all_changes_over_ranks, expected)


def changed_as_an_epoch_starts(world: World) -> list[float]:
    return over_ranks(world, unfreeze_first, freeze_first, Events.EPOCH_STARTED(once=2))


def test_a_change_as_an_epoch_starts_holds_from_its_first_batch(same_at_every_world_size):
    same_at_every_world_size(changed_as_an_epoch_starts, plainly(unfreeze_first, freeze_first))


def changed_between_runs(world: World) -> list[float]:
    net = models.new_net()
    optimizer = models.optimizer_for(net)
    freeze_first(net, optimizer)
    trainer = models.trainer_of(world, world.wrap(net), optimizer)
    loader = world.loader(models.samples(), global_batch_size=models.GLOBAL_BATCH)
    trainer.run(loader, max_epochs=1)
    unfreeze_first(net, optimizer)
    trainer.run(loader, max_epochs=models.EPOCHS)
    return models.values_of(net)


def test_a_change_between_two_runs_holds(same_at_every_world_size):
    same_at_every_world_size(changed_between_runs, plainly(unfreeze_first, freeze_first))


def changed_within_an_epoch(world: World, how: str, iteration: int = 2) -> list[float]:
    """The data is read six times within one epoch; the layer is unfrozen behind the first pass."""
    net = models.new_net()
    optimizer = models.optimizer_for(net)
    freeze_first(net, optimizer)
    model = world.wrap(net)
    trainer = models.trainer_of(world, model, optimizer)

    @trainer.on(Events.ITERATION_COMPLETED(once=iteration))
    def change() -> None:
        unfreeze_first(net, optimizer)
        if how == "rewrap":
            world.rewrap(model)

    loader = world.loader(models.samples(), global_batch_size=models.GLOBAL_BATCH)
    trainer.run(loader, max_epochs=1, epoch_length=2 * models.EPOCHS, window=1 if how == "window" else None)
    return models.values_of(net)


@pytest.mark.parametrize("how", ["rewrap", "window"])
def test_a_change_within_an_epoch_holds_when_asked_for(same_at_every_world_size, how):
    same_at_every_world_size(changed_within_an_epoch, plainly(unfreeze_first, freeze_first), how)


def test_a_change_within_an_epoch_is_an_error_that_says_how():
    with pytest.raises(RanksError) as raised:
        run_ranks(changed_within_an_epoch, 2, "unsaid", 3)
    assert isinstance(raised.value.__cause__, ModelChangedError)
    assert "first.weight requires gradients now; first.bias requires gradients now" in str(raised.value)
    assert "Call world.rewrap(model) on every rank" in str(raised.value)


def further(world: World) -> list[list[float]]:
    """A change in one of two models; a change under gradient accumulation, where a batch has two halves."""
    nets = [models.new_net(), models.new_net()]
    freeze_first(nets[0], models.optimizer_for(nets[0]))
    wrapped = [world.wrap(each) for each in nets]
    optimizer = torch.optim.SGD([*nets[0].parameters(), *nets[1].parameters()], lr=0.2, momentum=0.9)

    def step(engine: Engine, batch: Any) -> None:
        (sum(models.loss_of(each, *batch) for each in wrapped) * engine.state.weight).backward()
        if engine.state.group_end:
            optimizer.step()
            optimizer.zero_grad()

    trainer = Engine(step, accumulate=2)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda: nets[0].first.requires_grad_(True))
    trainer.run(world.loader(models.samples(), global_batch_size=models.GLOBAL_BATCH // 2), max_epochs=models.EPOCHS)
    return [models.values_of(each) for each in nets]


def test_a_change_in_one_of_two_models_under_accumulation(same_at_every_world_size):
    same_at_every_world_size(
        further, [plainly(unfreeze_first, freeze_first), plainly(lambda net, optimizer: None)], tolerance=1e-5
    )


def resumed(world: World, folder: Path, from_state: bool) -> list[bytes]:
    """An unbroken run that unfreezes behind its first epoch, or one that goes on from there with another wrap."""
    net = models.new_net()
    optimizer = models.optimizer_for(net)
    if not from_state:
        freeze_first(net, optimizer)
    model = world.wrap(net)
    trainer = models.trainer_of(world, model, optimizer)
    checkpoint = Checkpoint(folder, {"model": model, "optimizer": optimizer, "trainer": trainer}, every=None)
    if from_state:
        checkpoint.resume()
    else:

        @trainer.on(Events.EPOCH_COMPLETED(once=1))
        def unfreeze() -> None:
            unfreeze_first(net, optimizer)
            checkpoint.save(trainer, wait=True)

    trainer.run(world.loader(models.samples(), global_batch_size=models.GLOBAL_BATCH), max_epochs=models.EPOCHS)
    return [each.detach().numpy().tobytes() for each in net.parameters()]


def test_a_run_resumed_behind_a_change_equals_the_unbroken_one_to_the_bit(tmp_path):
    unbroken = run_ranks(resumed, 3, tmp_path, False)
    assert run_ranks(resumed, 3, tmp_path, True) == unbroken == [unbroken[0]] * 3


class Branching(nn.Module):
    """Uses its second layer every other time."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.calls = nn.Linear(3, 1), nn.Linear(3, 1), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.always(x) + (self.sometimes(x) if self.calls % 2 else 0.0)


def branching(world: World, **options: Any) -> list[float]:
    torch.manual_seed(7)
    net = Branching()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    trainer = models.trainer_of(world, world.wrap(net, **options) if options else world.wrap(net), optimizer)
    trainer.run(world.loader(models.samples(), global_batch_size=6), max_epochs=2)
    return models.values_of(net)


def branching_as_told(world: World) -> list[float]:
    return branching(world, find_unused_parameters=True)


def test_a_branch_that_is_not_always_used_is_named_with_the_remedy():
    """pytorch/pytorch#43259, pytorch/pytorch#112152."""
    with pytest.raises(RanksError) as raised:
        run_ranks(branching, 2)
    assert isinstance(raised.value.__cause__, ModelChangedError)
    assert "sometimes.weight; sometimes.bias got no gradient in the iteration before iteration 3" in str(raised.value)
    assert "find_unused_parameters=True" in str(raised.value)


def test_a_branch_that_is_not_always_used_trains_with_that_remedy(same_at_every_world_size):
    torch.manual_seed(7)
    net = Branching()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    for _ in range(2):
        for x, y in zip(*(each.split(6) for each in models.samples().tensors), strict=True):
            optimizer.zero_grad()
            models.loss_of(net, x, y).backward()
            optimizer.step()
    same_at_every_world_size(branching_as_told, models.values_of(net))


def adapter_within_an_epoch(world: World) -> None:
    net = models.new_net()
    optimizer = models.optimizer_for(net)
    trainer = models.trainer_of(world, world.wrap(net), optimizer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: models.add_adapter(net, optimizer))
    data = [tuple(each[:2] for each in models.samples().tensors)] * 200
    trainer.run(data)


def test_a_parameter_added_within_an_epoch_is_an_error_by_the_next_vote():
    with pytest.raises(RanksError) as raised:
        run_ranks(adapter_within_an_epoch, 2)
    assert isinstance(raised.value.__cause__, ModelChangedError)
    assert "adapter.weight is new" in str(raised.value)


def changed_on_one_rank(world: World) -> str:
    change = unfreeze_first if world.rank == world.world_size - 1 else (lambda net, optimizer: None)
    try:
        over_ranks(world, change, freeze_first)
    except DivergenceError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_change_on_one_rank_alone_is_an_error_on_all_in_words(world_size):
    said = run_ranks(changed_on_one_rank, world_size)
    assert len(set(said)) == 1
    assert "rank 0: nothing" in said[0]
    assert f"rank {world_size - 1}: first.weight requires gradients now" in said[0]


def unfrozen_whole(world: World) -> str:
    net = models.new_net().requires_grad_(False)
    model = world.wrap(net)
    head = world.wrap(nn.Linear(1, 1))
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1)
    trainer = models.trainer_of(world, lambda x: head(model(x)), optimizer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda: net.requires_grad_(True))
    try:
        trainer.run(world.loader(models.samples(), global_batch_size=6), max_epochs=2)
    except ModelChangedError as error:
        return str(error)
    return ""


def test_a_module_that_was_wrapped_frozen_says_that_it_must_be_wrapped_again():
    first, second = run_ranks(unfrozen_whole, 2)
    assert first == second
    assert "Net: first.weight requires gradients now" in first
    assert "model = world.wrap(module)" in first


# Not a change


def adversaries() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(6)
    return nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def adversarial_step(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    x: torch.Tensor,
    weight: float,
) -> None:
    """As GAN scripts do it: the discriminator is frozen while the generator trains, and stays so at the step's end."""
    discriminator.requires_grad_(True)
    optimizers[1].zero_grad()
    fake = generator(x)
    ((discriminator(x).mean() - discriminator(fake.detach()).mean()) * weight).backward()
    optimizers[1].step()
    discriminator.requires_grad_(False)
    optimizers[0].zero_grad()
    (discriminator(fake).mean() * weight).backward()
    optimizers[0].step()


def adversarial(world: World) -> list[list[float]]:
    bare = adversaries()
    wrapped = [world.wrap(each) for each in bare]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in bare]

    def step(engine: Engine, batch: Any) -> None:
        adversarial_step(wrapped[0], wrapped[1], optimizers, batch[0], engine.state.weight)

    Engine(step).run(world.loader(models.samples(), global_batch_size=6), max_epochs=3)
    return [models.values_of(each) for each in bare]


def test_a_gans_step_may_freeze_its_discriminator(same_at_every_world_size):
    """junyanz/pytorch-CycleGAN-and-pix2pix#594, jolibrain/joliGEN#104."""
    bare = adversaries()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in bare]
    for _ in range(3):
        for x in models.samples().tensors[0].split(6):
            adversarial_step(*bare, optimizers, x, 1.0)
    same_at_every_world_size(adversarial, [models.values_of(each) for each in bare])


# What stays


def what_stays(world: World) -> dict[str, Any]:
    net = models.new_net()
    optimizer = models.optimizer_for(net)
    freeze_first(net, optimizer)
    model = world.wrap(net, bucket_cap_mb=7)
    calls = {"forward": 0, "reduction": 0}

    def count_forward(*_: Any) -> None:
        calls["forward"] += 1

    def count_reduction(state, bucket):  # DDP reads annotations, and these are texts
        calls["reduction"] += 1
        work = torch.distributed.all_reduce(bucket.buffer().div_(world.world_size), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    handle = model.register_forward_hook(count_forward)
    model.register_comm_hook(None, count_reduction)
    model.marked = "by the script"
    model.eval()
    momentum = torch.ones_like(net.second.weight)
    optimizer.state[net.second.weight]["momentum_buffer"] = momentum
    net.second.weight.grad = torch.full_like(net.second.weight, 2.0)
    reducer = id(model.reducer)
    unfreeze_first(net, optimizer)
    world.rewrap(model)
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
    kept = {
        **calls,
        "gradient": net.second.weight.grad.mean().item() > 2.0,
        "momentum": optimizer.state[net.second.weight]["momentum_buffer"] is momentum,
        "options": model.bucket_bytes_cap == 7 << 20,
        "marked": model.marked,
        "training": model.training,
        "new": id(model.reducer) != reducer,
        "same_gradient": len({str(each) for each in world.gather_objects(net.first.weight.grad.tolist())}),
    }
    handle.remove()
    model(torch.ones(2, 3)).sum().backward()
    return kept | {"after_removal": calls["forward"]}


def test_hooks_options_and_states_stay_when_a_model_is_wrapped_again():
    for kept in run_ranks(what_stays, 2):
        assert kept == {
            "forward": 2,
            "reduction": 2,
            "gradient": True,
            "momentum": True,
            "options": True,
            "marked": "by the script",
            "training": False,
            "new": True,
            "same_gradient": 1,
            "after_removal": 2,
        }


def wrapped_for_several(world: World) -> list[str]:
    """A change that DDP cannot follow leaves the model as it was."""
    net = models.new_net()
    model = world.wrap(net)
    net.adapter = nn.LazyLinear(1)
    said = []
    try:
        world.rewrap(model)
    except ValueError as error:
        said.append(str(error))
    net.adapter = None
    model(torch.full((1, 3), float(world.rank))).sum().backward()
    said += {str(each) for each in world.gather_objects(net.first.weight.grad.tolist())}
    try:
        world.rewrap(net)
    except ValueError as error:
        said.append(str(error))
    return said


def test_a_change_that_ddp_cannot_follow_leaves_the_model_as_it_was():
    for said in run_ranks(wrapped_for_several, 2):
        assert len(said) == 3
        assert "cannot be wrapped in DDP again" in said[0]
        assert "uninitialized" in said[0]
        assert "model = world.wrap(module)" in said[2]
