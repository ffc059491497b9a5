"""The job with allstep: python, allstep run, torchrun or srun with_allstep.py."""

import math

import task
import torch

import allstep


def main(world, options):
    train, validation = task.datasets()
    model = world.wrap(task.LanguageModel())
    optimizer = torch.optim.AdamW(task.parameter_groups(model), lr=task.RATE)

    def step(engine, batch):
        model.train()
        loss = task.loss_of(model, world.to_device(batch))
        (loss * engine.state.weight).backward()
        if engine.state.group_end:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def evaluation_step(engine, batch):
        model.eval()
        return task.loss_of(world.unwrap(model), world.to_device(batch))

    trainer = allstep.Engine(step, accumulate=task.ACCUMULATE, precision="bf16")
    evaluator = allstep.Engine(evaluation_step, idle="skip", uneven="longest", resumes=False, precision="bf16")
    allstep.Metrics({"loss": (loss := allstep.Mean()), "perplexity": math.e**loss}).attach(evaluator)
    allstep.EarlyStopping(task.PATIENCE, lambda engine: -float(engine.state.metrics["loss"]), trainer).attach(evaluator)
    clipping = allstep.GradientClipping(optimizer, task.CLIP).attach(trainer)
    allstep.Schedule(lambda step: task.cosine(step, options.iterations // task.ACCUMULATE), optimizer).attach(trainer)
    allstep.Evaluate(evaluator, world.loader(validation, batch_size=64), every=options.evaluate).attach(trainer)
    norm = {"values": lambda engine: {"norm": clipping.norm}}
    allstep.Track(options.out, ["tensorboard"], every=options.tell, loss="loss", **norm).attach(trainer).watch(
        evaluator
    )
    allstep.Checkpoint(options.out / "checkpoints", every=options.save).attach(trainer).resume()

    @trainer.on(allstep.Events.ITERATION_COMPLETED(every=options.tell))
    def log(engine):
        world.print(f"iteration {engine.state.iteration}: loss {engine.state.output:.4f}")

    trainer.run(world.loader(train, batch_size=task.BATCH, shuffle=True, drop_last=True), max_iters=options.iterations)
    world.print("digest", task.digest(model))


if __name__ == "__main__":
    with allstep.init(seed=0) as world:
        main(world, task.Options.read())
