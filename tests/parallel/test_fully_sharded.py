"""Models in parts over real ranks: what one process would have trained, and what may be asked of the parts."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from allstep import Engine, Events, Mean, Metrics, Sum, create_supervised_evaluator
from allstep.errors import ArgumentTypeError, ParallelError
from allstep.parallel import is_fully_sharded
from allstep.testing import run_ranks
from allstep.world import World
from tests.parallel.sharded_training import (
    Block,
    Plan,
    SharedBlock,
    Texts,
    Transformer,
    alone,
    check_equal,
    check_resumes,
    train,
    whole,
)

pytestmark = pytest.mark.slow


def carried(world: World) -> Any:
    """What gloo has to carry for parts of a model: to gather them, and to sum and scatter, over uneven sizes too."""
    parts = [torch.empty(2) for _ in range(world.world_size)]
    torch.distributed.all_gather(parts, torch.full((2,), float(world.rank)))
    mine = torch.empty(3)
    torch.distributed.reduce_scatter_tensor(mine, torch.arange(3.0 * world.world_size))
    return [each[0].item() for each in parts], mine.tolist()


def test_gloo_gathers_and_reduces_parts_on_the_cpu() -> None:
    for rank, (parts, mine) in enumerate(run_ranks(carried, 3)):
        assert parts == [0.0, 1.0, 2.0]
        assert mine == [3 * each for each in (0.0 + 3 * rank, 1.0 + 3 * rank, 2.0 + 3 * rank)]


BY_BLOCK = Plan(options=(("units", Block),))


@pytest.mark.parametrize(
    ("ranks", "mesh", "plan"),
    [
        pytest.param(3, "shard=3", BY_BLOCK, marks=pytest.mark.nightly),
        (4, "replicate=2,shard=2", Plan(options=(("units", Block), ("reshard_after_forward", False)))),
        pytest.param(2, "shard=2", Plan(), marks=pytest.mark.nightly),
        pytest.param(4, "shard=4", BY_BLOCK, marks=pytest.mark.nightly),
        pytest.param(4, "shard=2,tensor=2", BY_BLOCK, marks=pytest.mark.nightly),
        pytest.param(4, "data=2,tensor=2", Plan(), marks=pytest.mark.nightly),
        pytest.param(2, "replicate=2", Plan(), marks=pytest.mark.nightly),
        pytest.param(1, "shard=1", BY_BLOCK, marks=pytest.mark.nightly),
        pytest.param(3, "shard=3", Plan(accumulate=1, clip=None), marks=pytest.mark.nightly),
        pytest.param(2, "shard=2", Plan(options=(("cpu_offload", True),)), marks=pytest.mark.nightly),
        pytest.param(2, "shard=2", replace(BY_BLOCK, clips_by_handler=True), marks=pytest.mark.nightly),
    ],
)
def test_a_mesh_trains_what_one_process_trains(ranks: int, mesh: str, plan: Plan) -> None:
    # 37 samples in batches of 6: ragged ends, in which some ranks have nothing, over 21 iterations.
    expected = alone(plan)
    assert expected["steps"] == 21
    for found in run_ranks(train, ranks, plan, env={"ALLSTEP_MESH": mesh}):
        check_equal(found, expected)
        assert found["passes"] == expected["passes"] == 21


@pytest.mark.parametrize(
    ("ranks", "mesh"),
    [
        (2, "shard=2"),
        pytest.param(3, "shard=3", marks=pytest.mark.nightly),
        pytest.param(4, "shard=2,tensor=2", marks=pytest.mark.nightly),
        pytest.param(4, "replicate=2,shard=2", marks=pytest.mark.nightly),
    ],
)
def test_a_run_in_parts_resumes_on_its_mesh_to_the_last_bit(ranks: int, mesh: str, tmp_path: Any) -> None:
    check_resumes(ranks, mesh, BY_BLOCK, str(tmp_path))


def frozen_and_adapted() -> nn.Module:
    """Low-rank adapters beside frozen weights."""
    model = Transformer()
    for name, each in model.named_parameters():
        each.requires_grad_("up" in name or name.startswith("head"))
    return model


class OneGroup(nn.Module):
    """Tied weights inside of one unit and across two."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks[1].mix.weight = self.blocks[0].mix.weight
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[1](self.blocks[0](self.embedding(tokens))))


def of_several_kinds(world: World) -> list[dict[str, Any]]:
    sequential = Plan(make=SharedBlock, options=(("units", nn.Sequential),), epochs=1)
    plans = [Plan(make=frozen_and_adapted, options=(("units", Block),), epochs=1), sequential]
    return [train(world, each) for each in [*plans, Plan(make=OneGroup, options=(("units", Block),), epochs=1)]]


def test_frozen_shared_and_tied_parts_train_as_on_one_process() -> None:
    (alone,) = run_ranks(of_several_kinds, 1)
    for rank in run_ranks(of_several_kinds, 3, env={"ALLSTEP_MESH": "shard=3"}):
        for found, expected in zip(rank, alone, strict=True):
            check_equal(found, expected)


def wrapping(world: World) -> dict[str, Any]:
    torch.manual_seed(world.rank)  # ranks begin apart, and train rank 0's model
    model = Transformer()
    first = model.blocks[0].up.weight.detach().clone()
    said = {}
    for name, options in {
        "precision": {"precision": "int8"},
        "ignored": {"ignored": [nn.Parameter(torch.ones(2))]},
        "option": {"unit": Block},
        "ddp": {"find_unused_parameters": True},
    }.items():
        with pytest.raises((ParallelError, ArgumentTypeError)) as raised:
            world.wrap(model, **options)
        said[name] = str(raised.value)
    other = nn.Sequential(nn.Linear(2, 2))
    assert not isinstance(world.wrap(other, ignored=[other[0].bias])[0].bias, DTensor)
    wrapped = world.wrap(model, units=Block, precision="bf16")
    assert wrapped is model
    assert is_fully_sharded(model)
    assert is_fully_sharded(model.blocks[0])
    with pytest.raises(ParallelError, match="sharded already"):
        world.wrap(model)
    inside: list[torch.dtype] = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    output = model(torch.zeros(1, 5, dtype=torch.int64))
    output.sum().backward()
    weight = model.blocks[0].up.weight
    return {
        "said": said,
        "first": first,
        "now": whole(weight),
        "dtypes": (inside[0], output.dtype, weight.dtype, weight.grad.dtype),
        "rows": len(weight.to_local()),
    }


def test_a_model_in_parts_has_rank_zeros_values_and_computes_in_16_bits() -> None:
    ranks = run_ranks(wrapping, 2, env={"ALLSTEP_MESH": "shard=-1"})
    for each in ranks:
        assert torch.equal(each["now"], ranks[0]["first"])
        assert each["dtypes"] == (torch.bfloat16, torch.float32, torch.float32, torch.float32)
        assert each["rows"] == 12
    said = ranks[1]["said"]
    assert "precision is 'int8'" in said["precision"]
    assert "no parameter of the module" in said["ignored"]
    assert "did you mean units?" in said["option"]
    assert "find_unused_parameters=True, which is no option" in said["ddp"]


def without_shard(world: World) -> tuple[torch.dtype, torch.dtype, str]:
    model = world.wrap(Transformer(), units=Block, precision="bf16")
    inside: list[torch.dtype] = []
    world.unwrap(model).head.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    output = model(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ParallelError) as raised:
        world.wrap(Transformer(), cpu_offload=True)
    return inside[0], output.dtype, str(raised.value)


def test_a_script_for_parts_runs_without_a_mesh_to_shard_over() -> None:
    (alone,) = run_ranks(without_shard, 1)
    assert alone[:2] == (torch.bfloat16, torch.float32)
    assert "cpu_offload=, which only a model in parts can have, and there is no mesh" in alone[2]
    replicated = run_ranks(without_shard, 2, env={"ALLSTEP_MESH": "replicate=2"})[1]
    assert replicated[:2] == (torch.bfloat16, torch.float32)
    assert "the mesh has replicate" in replicated[2]


def built(world: World) -> list[torch.Tensor]:
    world.seed_everything(11)
    with world.building():
        model = Transformer()
        assert model.head.weight.is_meta == (world.mesh is not None)
    model = world.wrap(model, **({"units": Block} if world.mesh is not None else {}))
    drawn = torch.rand(2)  # the generator stands where it stands behind an unsharded model
    return [*(whole(each) for each in model.parameters()), drawn]


def test_a_model_built_in_parts_has_the_values_of_the_whole_one() -> None:
    (alone,) = run_ranks(built, 1)
    for found in run_ranks(built, 3, env={"ALLSTEP_MESH": "shard=3"}):
        for mine, expected in zip(found, alone, strict=True):
            assert torch.equal(mine, expected)


class Unset(nn.Module):
    def __init__(self, resets: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.bias = nn.Parameter(torch.zeros(4))
        if resets:
            self.reset_parameters = lambda: nn.init.ones_(self.weight)


def built_unset(world: World) -> list[str]:
    said = []
    for resets in (False, True):
        with world.building(meta=True):
            model = Unset(resets)
        with pytest.raises(ParallelError) as raised:
            world.wrap(model)
        said.append(str(raised.value))
    return said


def test_tensors_that_nobody_sets_are_named() -> None:
    (said,) = run_ranks(built_unset, 1, env={"ALLSTEP_MESH": "shard=1"})
    assert "Unset) was built without values and has no reset_parameters()" in said[0]
    assert "leaves bias unset" in said[1]


def adversarial(world: World, plan: Plan) -> dict[str, Any]:
    """Two sharded nets, each of which is trained through the other."""
    world.seed_everything(2)
    options = {"units": nn.Linear} if world.mesh is not None else {}
    generator = world.wrap(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double(), **options)
    critic = world.wrap(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double(), **options)
    makes = torch.optim.SGD(generator.parameters(), lr=0.1)
    judges = torch.optim.SGD(critic.parameters(), lr=0.1)
    losses = []

    def step(engine: Any, batch: Any) -> None:
        noise = batch[0][:, :3].double() / 11
        real, weight = batch[1][:, :4].double() / 11, engine.state.weight
        critic.requires_grad_(True)
        judges.zero_grad()
        apart = (critic(generator(noise).detach()) - critic(real)).mean()
        (apart * weight).backward()
        judges.step()
        critic.requires_grad_(False)
        makes.zero_grad()
        loss = -critic(generator(noise)).mean()
        (loss * weight).backward()
        makes.step()
        losses.append(loss.detach() * weight)

    Engine(step, uneven="longest").run(world.loader(Texts(plan.samples), global_batch_size=plan.batch), max_epochs=2)
    parameters = [*world.unwrap(generator).named_parameters("g"), *world.unwrap(critic).named_parameters("c")]
    return {
        "parameters": {name: whole(each) for name, each in parameters},
        "losses": world.all_reduce(torch.stack(losses), "mean"),
        "norms": torch.zeros(1),
    }


@pytest.mark.nightly
def test_two_sharded_nets_train_against_each_other() -> None:
    (alone,) = run_ranks(adversarial, 1, Plan())
    for mesh in ("shard=3", "replicate=3"):
        for found in run_ranks(adversarial, 3, Plan(), env={"ALLSTEP_MESH": mesh}):
            check_equal(found, alone)


def left_in_a_group(world: World) -> list[torch.Tensor]:
    """A group of two iterations that an exception leaves in its second, and that is begun again."""
    model = Plan(options=(("units", Block),)).wrapped(world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attempts: list[int] = []

    def step(engine: Engine, batch: Any) -> None:
        attempts.append(engine.state.iteration)
        if attempts == [1, 2]:
            raise KeyError("of every rank")
        loss = nn.functional.cross_entropy(model(batch[0]).transpose(1, 2), batch[1])
        (loss * engine.state.weight).backward()
        if engine.state.group_end:
            optimizer.step()
            optimizer.zero_grad()

    trainer = Engine(step, accumulate=2)
    loader = world.loader(Texts(8), global_batch_size=4)
    with suppress(KeyError):
        trainer.run(loader, max_epochs=1)
    trainer.run(loader, max_epochs=1)
    assert attempts == [1, 2, 1, 2]
    return [whole(each) for each in model.parameters()]


def test_a_group_that_is_begun_again_begins_without_gradients() -> None:
    (plain,) = run_ranks(left_in_a_group, 1)
    (parts,) = run_ranks(left_in_a_group, 1, env={"ALLSTEP_MESH": "shard=1"})
    for mine, expected in zip(parts, plain, strict=True):
        torch.testing.assert_close(mine, expected)


def with_statistics(world: World) -> list[torch.Tensor]:
    world.seed_everything(1)
    model = world.wrap(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))

    def step(engine: Engine, batch: Any) -> None:
        model(batch).sum().backward()

    noise = torch.Generator().manual_seed(world.rank)
    Engine(step).run([torch.randn(4, 3, generator=noise) for _ in range(3)], max_epochs=1)
    return [each.clone() for each in model.buffers()]


def test_statistics_of_a_model_in_parts_are_one_models_at_a_runs_end() -> None:
    first, second = run_ranks(with_statistics, 2, env={"ALLSTEP_MESH": "shard=2"})
    assert first[0].abs().sum() > 0
    assert all(map(torch.equal, first, second))


def thawing(world: World) -> dict[str, Any]:
    """The first block is trained from the second epoch on, the head until then."""
    model = replace(BY_BLOCK, make=lambda: Transformer(tied=False)).wrapped(world)
    inner = world.unwrap(model)
    inner.blocks[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []

    def step(engine: Engine, batch: Any) -> None:
        loss = nn.functional.cross_entropy(model(batch[0]).transpose(1, 2), batch[1]) * engine.state.weight
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()

    def thaw() -> None:
        inner.blocks[0].requires_grad_(True)
        inner.head.requires_grad_(False)

    trainer = Engine(step, uneven="longest")
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), thaw)
    trainer.run(world.loader(Texts(13), global_batch_size=4), max_epochs=2)
    return {
        "parameters": {name: whole(each) for name, each in inner.named_parameters()},
        "losses": world.all_reduce(torch.stack(losses), "mean"),
        "norms": torch.zeros(1),
    }


@pytest.mark.nightly
def test_parts_that_are_frozen_and_thawed_between_epochs_follow() -> None:
    (alone,) = run_ranks(thawing, 1)
    for found in run_ranks(thawing, 2, env={"ALLSTEP_MESH": "shard=2"}):
        check_equal(found, alone)


def evaluating(world: World) -> tuple[float, int]:
    model = BY_BLOCK.wrapped(world)
    evaluator = create_supervised_evaluator(model, output_transform=lambda x, y, scores: (scores, y))
    losses = {
        "loss": lambda output: nn.functional.cross_entropy(output[0].mT, output[1], reduction="none").mean(1),
        "samples": lambda output: torch.ones(len(output[1])),
    }
    Metrics({"loss": Mean(), "samples": Sum()}).attach(evaluator, losses)
    evaluator.run(world.loader(Texts(13), global_batch_size=6))
    return evaluator.state.metrics["loss"], evaluator.state.metrics["samples"]


def test_a_model_in_parts_is_evaluated_exactly_over_data_that_is_uneven() -> None:
    # The last of 13 samples is one rank's alone, and its forward pass needs the parts of all.
    (alone,) = run_ranks(evaluating, 1)
    for loss, samples in run_ranks(evaluating, 3, env={"ALLSTEP_MESH": "shard=3"}):
        assert samples == alone[1] == 13
        assert float(loss) == pytest.approx(float(alone[0]), rel=1e-6)


def skipping(world: World) -> list[torch.Tensor]:
    """Rank 1 finds out, behind the forward pass, that its batch is bad."""
    model = BY_BLOCK.wrapped(world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(engine: Engine, batch: Any) -> None:
        loss = nn.functional.cross_entropy(model(batch[0]).transpose(1, 2), batch[1])
        if world.rank == 1 and engine.state.iteration in (1, 3):
            loss = loss * torch.nan
            engine.state.skip()
        (loss * engine.state.weight).backward()
        optimizer.step()
        optimizer.zero_grad()

    Engine(step).run(world.loader(Texts(16), global_batch_size=4), max_epochs=1)
    return [whole(each) for each in world.unwrap(model).parameters()]


def test_a_batch_that_is_skipped_behind_the_forward_pass_adds_nothing() -> None:
    replicated = run_ranks(skipping, 2, env={"ALLSTEP_MESH": "replicate=2"})[0]
    for found in run_ranks(skipping, 2, env={"ALLSTEP_MESH": "shard=2"}):
        for mine, expected in zip(found, replicated, strict=True):
            torch.testing.assert_close(mine, expected)
