"""Trains the network of examples/digits.py and prints, as JSON: the loss of each iteration, with --metric the mean
loss, the test accuracy of each epoch, and how many graphs XLA had compiled when each epoch had ended.

    python digits_curve.py DEVICE [--spmd] [--metric] [--accumulate N] [--precision P] [--epochs N]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassAccuracy

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
import allstep
from allstep import Engine, Events, Gather, Mean, Metrics

import digits


def compilations() -> int:
    """Graphs that were compiled in this process."""
    if "torch_xla" not in sys.modules:
        return 0
    from torch_xla.debug import metrics

    return (metrics.metric_data("CompileTime") or (0,))[0]


def main(world: allstep.World, options: argparse.Namespace) -> None:
    """Train, and print what came of it."""
    world.seed_everything(1)
    train_set, test_set = digits.digits()
    network = digits.network()
    network[6] = torch.nn.Identity()  # dropout draws other numbers on another device
    model = world.wrap(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    losses: list[torch.Tensor] = []
    found: dict[str, list[float]] = {"losses": [], "means": [], "accuracies": [], "compiled": []}

    def train_step(engine: Engine, batch: object) -> torch.Tensor:
        x, y = world.to_device(batch)
        model.train()
        loss = F.cross_entropy(model(x), y)
        (loss * engine.state.weight).backward()
        if engine.state.group_end:
            world.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    trainer = Engine(train_step, accumulate=options.accumulate, precision=options.precision)
    if options.metric:
        Metrics({"loss": Mean()}).attach(trainer)
    evaluator = allstep.create_supervised_evaluator(model)
    Metrics({"accuracy": MulticlassAccuracy(10, average="micro")}).attach(evaluator, usage="run")
    Gather("y_pred", "y").attach(evaluator)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output))
    # 1437 samples in batches of 64, and 360 in batches of 100: the last batch of each pass is smaller than the others.
    train_loader = world.loader(train_set, global_batch_size=64, shuffle=True)
    test_loader = world.loader(test_set, global_batch_size=100)

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate(engine: Engine) -> None:
        found["means"] += map(float, engine.state.metrics.values())
        state = evaluator.run(test_loader)
        found["accuracies"].append(float(state.metrics["accuracy"]))
        is_right = state.gathered["y_pred"].argmax(1) == test_set.tensors[1]
        assert abs(float(is_right.float().mean()) - found["accuracies"][-1]) < 1e-6

    @trainer.on(Events.EPOCH_STARTED | Events.COMPLETED)
    def count(engine: Engine) -> None:
        found["compiled"].append(compilations())

    trainer.run(train_loader, max_epochs=options.epochs)
    found["losses"] = torch.stack(losses).tolist()
    print(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device")
    parser.add_argument("--spmd", action="store_true")
    parser.add_argument("--metric", action="store_true")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    if given.spmd:
        import torch_xla.runtime

        torch_xla.runtime.use_spmd()
    with allstep.init(device=given.device) as opened:
        main(opened, given)
