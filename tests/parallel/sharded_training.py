"""A small transformer, trained on ranks of any mesh and on one process, for tests to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from allstep import Checkpoint, Engine, GradientClipping
from allstep.testing import run_ranks
from allstep.world import World

WIDTH, TOKENS, LENGTH = 8, 11, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        attention = torch.softmax(h @ self.mix(h).transpose(1, 2), -1) @ h
        return x + attention + self.down(torch.tanh(self.up(h)))


class Transformer(nn.Module):
    """Two blocks, a head whose weight is tied to the embedding, and a buffer that counts its forward passes."""

    def __init__(self, tied: bool = True, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class SharedBlock(nn.Module):
    """One block that two others use, besides being called by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        shared = Block()
        self.outer = nn.ModuleList(
            [nn.Sequential(shared, nn.Linear(WIDTH, WIDTH)), nn.Sequential(shared, nn.Linear(WIDTH, WIDTH))]
        )
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for each in self.outer:
            x = each(x)
        return self.head(x)


class Texts(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __init__(self, samples: int) -> None:
        draw = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(0, TOKENS, (samples, LENGTH + 1), generator=draw)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokens[at, :-1], self.tokens[at, 1:]


@dataclass(frozen=True)
class Plan:
    """How to train: `samples` in global batches of `batch`; `make` makes the model, `options` are those of `wrap`."""

    samples: int = 37
    batch: int = 6
    epochs: int = 3
    accumulate: int = 2
    clip: float | None = 0.3
    clips_by_handler: bool = False
    make: Callable[[], nn.Module] = Transformer
    folder: str | None = None  # to save to, and to go on from
    options: tuple[tuple[str, Any], ...] = ()
    everywhere: tuple[tuple[str, Any], ...] = ()  # options of `wrap` also where no model is in parts

    def wrapped(self, world: World) -> nn.Module:
        world.seed_everything(5)
        model = self.make().double()
        is_divided = world.mesh is not None and {"shard", "tensor"} & {*(world.mesh.mesh_dim_names or ())}
        options = dict(self.options) if is_divided else {}
        if "ignored" in options:  # parameters of a model that is made only now
            options["ignored"] = options["ignored"](model)
        return world.wrap(model, **options, **dict(self.everywhere))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(world: World, plan: Plan) -> dict[str, Any]:
    """Train as the plan says; losses over all ranks, norms, and the whole parameters in the end."""
    model = plan.wrapped(world)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    losses: list[torch.Tensor] = []
    norms: list[float] = []

    def step(engine: Engine, batch: Any) -> None:
        tokens, following = batch
        loss = nn.functional.cross_entropy(model(tokens).transpose(1, 2), following) * engine.state.weight
        # What a rank without a batch computes is to leave no trace, whatever it is.
        (loss if engine.state.active else loss * torch.nan).backward()
        losses.append(loss.detach() if engine.state.active else torch.zeros_like(loss))
        if engine.state.group_end:
            if plan.clip is not None and not plan.clips_by_handler:
                norms.append(world.clip_grad_norm_(model, plan.clip))
            optimizer.step()
            optimizer.zero_grad()

    engine = Engine(step, uneven="longest", accumulate=plan.accumulate)
    if plan.clip is not None and plan.clips_by_handler:
        GradientClipping(optimizer, plan.clip).attach(engine)
    if plan.folder is not None:
        checkpoint = Checkpoint(plan.folder).attach(engine)
        checkpoint.resume()
    engine.run(world.loader(Texts(plan.samples), global_batch_size=plan.batch, shuffle=True), max_epochs=plan.epochs)
    return {
        "parameters": {name: whole(each) for name, each in world.unwrap(model).named_parameters()},
        "losses": world.all_reduce(torch.stack(losses), "mean"),
        "norms": torch.tensor([0.0, *map(float, norms)]),
        "moments": [whole(each["exp_avg"]) for each in optimizer.state.values()],
        "steps": engine.state.iteration,
        "passes": getattr(world.unwrap(model), "passes", torch.zeros(())).item(),
    }


def alone(plan: Plan) -> dict[str, Any]:
    """What `train` gives on one process, where a plan's options change nothing; computed once for equal plans."""
    return _alone(replace(plan, options=(), everywhere=()))


@cache
def _alone(plan: Plan) -> dict[str, Any]:
    (found,) = run_ranks(train, 1, plan)
    return found


def check_equal(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    """Equal to `tolerance`, relative to the largest element of each tensor."""
    assert found["parameters"].keys() == expected["parameters"].keys()
    pairs = [(found["parameters"][name], each) for name, each in expected["parameters"].items()]
    for mine, other in [*pairs, (found["losses"], expected["losses"]), (found["norms"], expected["norms"])]:
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def check_resumes(ranks: int, mesh: str, plan: Plan, folder: str) -> None:
    """A run of two epochs that ended behind the first and goes on is an unbroken one to the last bit."""
    env, first = {"ALLSTEP_MESH": mesh}, replace(plan, epochs=1, folder=folder)
    unbroken = run_ranks(train, ranks, replace(plan, epochs=2), env=env)
    run_ranks(train, ranks, first, env=env)
    for found, expected in zip(run_ranks(train, ranks, replace(first, epochs=2), env=env), unbroken, strict=True):
        assert found["steps"] == expected["steps"]
        assert all(map(torch.equal, found["parameters"].values(), expected["parameters"].values()))
        assert all(map(torch.equal, found["moments"], expected["moments"]))
