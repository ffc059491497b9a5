"""The job with PyTorch-Ignite: torchrun --standalone --nproc-per-node 2 with_ignite.py."""

import math
from functools import partial

import ignite.distributed as idist
import task
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, EarlyStopping, global_step_from_engine
from ignite.handlers.tensorboard_logger import TensorboardLogger
from ignite.metrics import Average


def main(rank, options):
    torch.manual_seed(0)
    train, validation = task.datasets()
    loader = idist.auto_dataloader(train, batch_size=task.BATCH * idist.get_world_size(), shuffle=True, drop_last=True)
    validation_loader = idist.auto_dataloader(validation, batch_size=64 * idist.get_world_size())
    model = idist.auto_model(task.LanguageModel())
    torch.manual_seed(1 + rank)
    optimizer = torch.optim.AdamW(task.parameter_groups(model), lr=task.RATE)
    factor = partial(task.cosine, total=options.iterations // task.ACCUMULATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def step(engine, batch):
        model.train()
        is_last = engine.state.iteration % task.ACCUMULATE == 0
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss_of(model, batch)
        (loss / task.ACCUMULATE).backward()
        if is_last:
            engine.state.norm = torch.nn.utils.clip_grad_norm_(model.parameters(), task.CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def evaluation_step(engine, batch):
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            return task.loss_of(model, batch).item()

    trainer, evaluator = Engine(step), Engine(evaluation_step)
    Average().attach(evaluator, "loss")
    evaluator.add_event_handler(
        Events.COMPLETED, EarlyStopping(task.PATIENCE, lambda e: -e.state.metrics["loss"], trainer)
    )

    @trainer.on(Events.ITERATION_COMPLETED(every=options.evaluate))
    def evaluate(engine):
        value = math.exp(evaluator.run(validation_loader).metrics["loss"])
        if rank == 0:
            board.writer.add_scalar("val/perplexity", value, engine.state.iteration)
            print(f"iteration {engine.state.iteration}: perplexity {value:.4f}", flush=True)

    @trainer.on(Events.ITERATION_COMPLETED(every=options.tell))
    def log(engine):
        if rank == 0:
            values = {"loss": engine.state.output, "rate": schedule.get_last_lr()[0], "norm": engine.state.norm.item()}
            for name, value in values.items():
                board.writer.add_scalar(f"train/{name}", value, engine.state.iteration)
            print(f"iteration {engine.state.iteration}: loss {engine.state.output:.4f}", flush=True)

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=options.iterations), lambda engine: engine.terminate())
    objects = {"model": model, "optimizer": optimizer, "schedule": schedule, "trainer": trainer}
    folder = options.out / "checkpoints"
    place = global_step_from_engine(trainer, Events.ITERATION_COMPLETED)
    saver = Checkpoint(objects, DiskSaver(folder, require_empty=False), n_saved=3, global_step_transform=place)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=options.save), saver)
    if found := sorted(folder.glob("*.pt"), key=lambda each: int(each.stem.split("_")[-1])):
        Checkpoint.load_objects(objects, torch.load(found[-1], weights_only=False))
    if rank == 0:
        board = TensorboardLogger(options.out / "board", purge_step=trainer.state.iteration + 1)
    if trainer.state.iteration < options.iterations:
        trainer.run(loader, max_epochs=1 + options.iterations // len(loader))
    if rank == 0:
        board.close()
        print("digest", task.digest(getattr(model, "module", model)))


if __name__ == "__main__":
    with idist.Parallel(backend="gloo") as parallel:
        parallel.run(main, task.Options.read())
