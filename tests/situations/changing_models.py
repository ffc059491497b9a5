"""Models, data and plain training for the situations in which a model changes while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.utils.prune
from torch import nn
from torch.utils.data import TensorDataset

from allstep import Engine, Events, World

EPOCHS, GLOBAL_BATCH = 3, 6

Change = Callable[[nn.Module, torch.optim.Optimizer], None]
"""What a handler does to `(model, optimizer)` after the first epoch."""


class Net(nn.Module):
    """Two layers, and an adapter where one was added. It takes data of any float type."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)
        self.adapter: nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.second.weight.dtype)
        y = self.second(torch.tanh(self.first(x)))
        return y if self.adapter is None else y + self.adapter(x)


def new_net() -> Net:
    """The same at each call."""
    torch.manual_seed(1)
    return Net()


def samples(n: int = 12) -> TensorDataset:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(n, 3, generator=generator), torch.randn(n, 1, generator=generator))


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return nn.functional.mse_loss(out, y.to(out.dtype))


def optimizer_for(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)


def values_of(net: nn.Module) -> list[float]:
    """All parameters, in order."""
    return [round(value, 6) for each in net.parameters() for value in each.detach().double().flatten().tolist()]


def plainly(change: Change, before: Change | None = None) -> list[float]:
    """Train in one process without allstep, with a change after the first epoch; the parameters at the end."""
    net = new_net()
    optimizer = optimizer_for(net)
    if before is not None:
        before(net, optimizer)
    x, y = samples().tensors
    for epoch in range(EPOCHS):
        for at in range(0, len(x), GLOBAL_BATCH):
            optimizer.zero_grad()
            loss_of(net, x[at : at + GLOBAL_BATCH], y[at : at + GLOBAL_BATCH]).backward()
            optimizer.step()
        if epoch == 0:
            change(net, optimizer)
    return values_of(net)


def trainer_of(world: World, model: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    """An engine whose step is the usual one."""

    def step(engine: Engine, batch: Any) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, *batch)
        (loss * engine.state.weight).backward()
        optimizer.step()
        return loss.detach()

    return Engine(step)


def over_ranks(world: World, change: Change, before: Change | None = None, event: Any = None) -> list[float]:
    """The same with allstep; the change is made in a handler of `event`, by default of the first epoch's end."""
    net = new_net()
    optimizer = optimizer_for(net)
    if before is not None:
        before(net, optimizer)
    model = world.wrap(net)
    trainer = trainer_of(world, model, optimizer)
    trainer.add_event_handler(event or Events.EPOCH_COMPLETED(once=1), lambda: change(net, optimizer))
    trainer.run(world.loader(samples(), global_batch_size=GLOBAL_BATCH), max_epochs=EPOCHS)
    return values_of(net)


def all_changes_over_ranks(world: World) -> dict[str, list[float]]:
    """Each of the changes below, one after another."""
    return {name: over_ranks(world, change) for name, change in CHANGES.items()}


# Changes


def freeze_first(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net.first.requires_grad_(False)
    for each in net.first.parameters():
        each.grad = None  # else momentum and an old gradient move it on, without DDP too


def unfreeze_first(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net.first.requires_grad_(True)


def add_adapter(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(3)
    net.adapter = nn.Linear(3, 1)
    optimizer.add_param_group({"params": list(net.adapter.parameters())})


def replace_second(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(4)
    net.second = nn.Linear(4, 1)
    optimizer.add_param_group({"params": list(net.second.parameters())})


def cast(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net.double()
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    optimizer.zero_grad()


def assign_state(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loading with `assign=True` makes other tensors the parameters."""
    net.load_state_dict({name: each * 0.5 for name, each in net.state_dict().items()}, assign=True)
    optimizer.add_param_group({"params": list(net.parameters())})


def parametrize(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.parametrizations.weight_norm(net.first)
    optimizer.add_param_group({"params": list(net.first.parametrizations.parameters())})


def share_weight(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One tensor of two layers from now on; the other's is gone."""
    torch.manual_seed(5)
    net.second.bias = nn.Parameter(net.first.bias.detach()[:1].clone())
    net.adapter = nn.Linear(3, 1, bias=False)
    net.adapter.bias = net.second.bias
    optimizer.add_param_group({"params": [*net.adapter.parameters()]})


def prune(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.prune.l1_unstructured(net.first, "weight", amount=4)


def cast_and_back(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The same to look at; what DDP has put its hooks on is gone. A move to another device and back does that too."""
    net.double()
    net.float()


CHANGES = {
    each.__name__: each
    for each in (
        freeze_first,
        add_adapter,
        replace_second,
        cast,
        cast_and_back,
        assign_state,
        parametrize,
        share_weight,
        prune,
    )
}
