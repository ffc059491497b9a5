"""Models divided by a tensor-parallel plan, over real ranks: what one process would have trained."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from allstep.errors import ArgumentError, ParallelError
from allstep.parallel import styles_of, whole_tensor, wrap_module
from allstep.testing import run_ranks
from allstep.world import World
from tests.parallel.sharded_training import Block, Plan, alone, check_equal, check_resumes, train, whole

pytestmark = pytest.mark.slow

WIDTH, TOKENS = 8, 12


class Divided(nn.Module):
    """A transformer with tied embedding and head, whose class says how it is divided."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def tensor_plan(self) -> dict[str, str]:
        return {
            "embedding": "rowwise_split_input",
            "blocks.*.up": "colwise",
            "blocks.*.down": "rowwise",
            "head": "colwise_gather_output",
        }


BY_BLOCK = Plan(make=Divided, options=(("units", Block),))


@pytest.mark.parametrize(
    ("ranks", "mesh"),
    [
        (4, "shard=2,tensor=2"),
        pytest.param(2, "tensor=2", marks=pytest.mark.nightly),
        pytest.param(4, "data=2,tensor=2", marks=pytest.mark.nightly),
        pytest.param(4, "replicate=1,shard=1,tensor=4", marks=pytest.mark.nightly),
    ],
)
def test_a_divided_model_trains_what_one_process_trains(ranks: int, mesh: str) -> None:
    # Ragged ends, accumulation and clipping, over 21 iterations.
    expected = alone(BY_BLOCK)
    assert expected["steps"] == 21
    for found in run_ranks(train, ranks, BY_BLOCK, env={"ALLSTEP_MESH": mesh}):
        check_equal(found, expected)


class InSequence(nn.Module):
    """Blocks whose norms see a part of the sequence each, and a head whose logits stay divided."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.last = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.head(self.last(x))


IN_SEQUENCE = {
    "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
    "last": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
}


def with_divided_loss(world: World) -> dict[str, Any]:
    world.seed_everything(4)
    model = world.wrap(InSequence().double(), tensor_plan=IN_SEQUENCE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    world.rewrap(model)  # which has nothing to follow
    draw = torch.Generator().manual_seed(1)
    losses, norms = [], []
    for _ in range(4):
        tokens = torch.randint(0, TOKENS, (4, 4, 4), generator=draw)
        mine = tokens[world.data_rank :: world.data_size].reshape(-1, 4)
        with world.loss_parallel():
            loss = whole_tensor(nn.functional.cross_entropy(model(mine).flatten(0, 1), mine.roll(1, 1).flatten()))
            loss.backward()
        assert not isinstance(loss, DTensor)
        norms.append(world.clip_grad_norm_(model, 0.2))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(world.all_reduce(loss.detach(), "mean"))
    return {
        "parameters": {name: whole(each) for name, each in model.named_parameters()},
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
    }


@pytest.mark.parametrize(
    ("ranks", "mesh"),
    [
        (2, "tensor=2"),
        pytest.param(4, "data=2,tensor=2", marks=pytest.mark.nightly),
        pytest.param(4, "shard=2,tensor=2", marks=pytest.mark.nightly),
    ],
)
def test_norms_on_parts_of_a_sequence_and_a_divided_loss_equal_one_process(ranks: int, mesh: str) -> None:
    (alone,) = run_ranks(with_divided_loss, 1)
    for found in run_ranks(with_divided_loss, ranks, env={"ALLSTEP_MESH": mesh}):
        check_equal(found, alone)


def built(world: World) -> list[torch.Tensor]:
    world.seed_everything(11)
    with world.building(meta=world.mesh is not None):
        model = Divided()
    model = world.wrap(model, **({"units": Block} if world.mesh is not None else {}))
    if world.mesh is not None:
        assert model.head.weight is model.embedding.weight
        assert model.head.weight.to_local().numel() <= TOKENS * WIDTH // 2
    return [*(whole(each) for each in model.parameters()), torch.rand(2)]


@pytest.mark.nightly
@pytest.mark.parametrize(("ranks", "mesh"), [(2, "tensor=2"), (4, "shard=2,tensor=2"), (4, "data=2,tensor=2")])
def test_a_model_built_divided_has_the_values_of_the_whole_one(ranks: int, mesh: str) -> None:
    (alone,) = run_ranks(built, 1)
    for found in run_ranks(built, ranks, env={"ALLSTEP_MESH": mesh}):
        for mine, expected in zip(found, alone, strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.nightly
@pytest.mark.parametrize(("ranks", "mesh"), [(2, "tensor=2"), (4, "shard=2,tensor=2"), (4, "data=2,tensor=2")])
def test_a_divided_run_resumes_on_its_mesh_to_the_last_bit(ranks: int, mesh: str, tmp_path: Any) -> None:
    check_resumes(ranks, mesh, BY_BLOCK, str(tmp_path))


@pytest.mark.parametrize(
    ("plan", "size", "message"),
    [
        ({"blocks.*.upp": "colwise"}, 2, r"'upp' within 'blocks\.\*', only norm, mix, up, down; did you mean blocks"),
        ({"block.*.up": "colwise"}, 2, r"no 'block', only embedding, blocks, head; did you mean blocks\.\*\.up"),
        ({"blocks.*.up": "columnwise"}, 2, "did you mean colwise"),
        ({"blocks.*.up": 3}, 2, "give a style of torch.distributed.tensor.parallel"),
        ("colwise", 2, "give a dict"),
        ({"blocks.*.up": "colwise"}, 5, r"up \(Linear\) over tensor=5, but its out_features is 24"),
        ({"blocks.*": "colwise"}, 2, r"blocks\.0 \(Block\), but it divides nn.Linear and nn.Embedding alone"),
        ({"blocks.*.up": "colwise", "blocks.0.*": "rowwise"}, 2, "it divides nn.Linear|name it once"),
        ({"embedding": "rowwise"}, 2, "embedding.weight and head.weight are one tied weight"),
        ({"embedding": "colwise", "head": "colwise"}, 2, "are one tied weight"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_changes(plan: Any, size: int, message: str) -> None:
    model = Divided()
    with pytest.raises((ArgumentError, ParallelError), match=message):
        styles_of(model, plan, size)
    assert not any(isinstance(each, DTensor) for each in model.parameters())


class FromTheHub(nn.Module):
    """Offers its plan as Hugging Face's models do, for more than it has."""

    tp_plan: ClassVar[dict[str, str]] = {"layers.*": "colwise_rep", "lm_head": "colwise"}

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def test_a_model_of_the_hub_offers_its_plan() -> None:
    found = styles_of(FromTheHub(), None, 2)
    assert list(found) == ["layers.0", "layers.1"]
    assert all(isinstance(each, ColwiseParallel) for each in found.values())
    assert styles_of(FromTheHub(), {}, 2) == {}


def in_16_bits(world: World) -> tuple[float, torch.dtype, torch.dtype, list[torch.dtype]]:
    world.seed_everything(3)
    model = Divided()
    tokens = torch.arange(12).view(2, 6)
    plain = model(tokens).detach()
    model = world.wrap(model, units=Block, precision="bf16")
    inside: list[torch.dtype] = []
    model.blocks[0].down.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    output = model(tokens)
    output.sum().backward()
    apart = float((output.detach() - plain).norm() / plain.norm())
    return apart, inside[0], output.dtype, [each.grad.dtype for each in model.parameters()]


@pytest.mark.nightly
@pytest.mark.parametrize(("ranks", "mesh"), [(2, "tensor=2"), (4, "shard=2,tensor=2"), (4, "data=2,tensor=2")])
def test_a_divided_model_computes_in_16_bits_and_keeps_32(ranks: int, mesh: str) -> None:
    for apart, inside, output, gradients in run_ranks(in_16_bits, ranks, env={"ALLSTEP_MESH": mesh}):
        assert 0 < apart < 0.03
        assert (inside, output) == (torch.bfloat16, torch.float32)
        assert set(gradients) == {torch.float32}


class OneLayer(nn.Module):
    """Large for its test, and divided by heads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(512, 2048), nn.Linear(2048, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize(("ranks", "shard"), [(64, 8), (512, 64)])
def test_parts_of_a_divided_model_have_their_sizes_on_many_ranks(ranks: int, shard: int) -> None:
    # A group that torch has for this: nothing is sent, and every collective returns at once.
    dist.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks // shard // 8, shard, 8), mesh_dim_names=("replicate", "shard", "tensor"))
        model = nn.Sequential(*[OneLayer() for _ in range(2)])
        plan = {"*.up": "colwise", "*.down": "rowwise"}
        wrap_module(model, torch.device("cpu"), ranks, mesh=mesh, tensor_plan=plan, units=OneLayer)
        assert model[0].up.weight.shape == (2048, 512)
        assert model[0].up.weight.to_local().shape == (2048 // 8 // shard, 512)
        assert model[0].down.weight.to_local().shape == (512 // shard, 2048 // 8)
        assert model[0].down.bias.to_local().shape == (512 // shard,)
        model(torch.ones(2, 512)).sum().backward()
        assert model[1].up.weight.grad.to_local().shape == (2048 // 8 // shard, 512)
    finally:
        dist.destroy_process_group()
