"""The job with Accelerate: torchrun --standalone --nproc-per-node 2 with_accelerate.py."""

import math
from functools import partial

import task
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from torch.nn import functional
from torch.utils.data import DataLoader


class Place:
    """Where training is; registered, so that it is saved."""

    def __init__(self):
        self.iteration = self.epoch = self.done = self.worse = 0
        self.best = math.inf

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


@torch.no_grad()
def perplexity(accelerator, model, loader):
    model.eval()
    losses = []
    for batch in loader:
        scores = model(batch[:, :-1]).float().transpose(1, 2)
        each = functional.cross_entropy(scores, batch[:, 1:], reduction="none").mean(1)
        losses.append(accelerator.gather_for_metrics(each))  # by sample, since padded ones are dropped by sample
    model.train()
    return math.exp(torch.cat(losses).double().mean())


def main(options):
    project = ProjectConfiguration(str(options.out), automatic_checkpoint_naming=True, total_limit=3)
    accelerator = Accelerator(
        mixed_precision="bf16",
        gradient_accumulation_steps=task.ACCUMULATE,
        log_with="tensorboard",
        cpu=True,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        project_config=project,
    )
    set_seed(0)
    train, validation = task.datasets()
    model = task.LanguageModel()
    optimizer = torch.optim.AdamW(task.parameter_groups(model), lr=task.RATE)
    factor = partial(task.cosine, total=options.iterations // task.ACCUMULATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    loaders = DataLoader(train, task.BATCH, shuffle=True, drop_last=True), DataLoader(validation, 64)
    model, optimizer, loader, validation_loader = accelerator.prepare(model, optimizer, *loaders)
    set_seed(1, device_specific=True)
    place = Place()
    accelerator.register_for_checkpointing(schedule, place)
    accelerator.init_trackers("board")
    found = sorted((options.out / "checkpoints").glob("checkpoint_*"), key=lambda each: int(each.name.split("_")[1]))
    if found:
        accelerator.load_state(str(found[-1]))
        project.iteration = int(found[-1].name.split("_")[1]) + 1
    model.train()
    while place.iteration < options.iterations and place.worse < task.PATIENCE:
        loader.set_epoch(place.epoch)
        for batch in skip_first_batches(loader, place.done) if place.done else loader:
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = task.loss_of(model, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), task.CLIP)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    schedule.step()
            place.iteration, place.done = place.iteration + 1, place.done + 1
            if place.iteration % options.tell == 0:
                rate = schedule.get_last_lr()[0]
                values = {"train/loss": loss.item(), "train/rate": rate, "train/norm": norm.item()}
                accelerator.log(values, place.iteration)
                accelerator.print(f"iteration {place.iteration}: loss {loss.item():.4f}", flush=True)
            if place.iteration % options.evaluate == 0:
                value = perplexity(accelerator, model, validation_loader)
                better = value < place.best
                place.worse, place.best = (0, value) if better else (place.worse + 1, place.best)
                accelerator.log({"val/perplexity": value}, place.iteration)
                accelerator.print(f"iteration {place.iteration}: perplexity {value:.4f}", flush=True)
            if place.iteration % options.save == 0:
                accelerator.save_state()
            if place.iteration >= options.iterations or place.worse >= task.PATIENCE:
                break
        else:
            place.epoch, place.done = place.epoch + 1, 0
    accelerator.print("digest", task.digest(accelerator.unwrap_model(model)))
    accelerator.end_training()


if __name__ == "__main__":
    main(task.Options.read())
