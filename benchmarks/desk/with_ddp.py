"""The job with plain PyTorch: torchrun --standalone --nproc-per-node 2 with_ddp.py."""

import contextlib
import math
import os
from functools import partial

import task
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter


@torch.no_grad()
def perplexity(model, loader):
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for batch in loader:
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss_of(model.module, batch)
        total += torch.tensor([loss.double() * len(batch), len(batch)])
    dist.all_reduce(total)
    model.train()
    return math.exp(total[0] / total[1])


def save(folder, iteration, state):
    generators = [None] * dist.get_world_size()
    dist.all_gather_object(generators, torch.get_rng_state())
    if dist.get_rank() == 0:
        torch.save({**state, "generators": generators}, folder / "partial")
        os.replace(folder / "partial", folder / f"{iteration:08d}.pt")
        for old in sorted(folder.glob("*.pt"))[:-3]:
            old.unlink()
    dist.barrier()


def main(options):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    train, validation = task.datasets()
    model = DistributedDataParallel(task.LanguageModel())
    torch.manual_seed(1 + rank)
    optimizer = torch.optim.AdamW(task.parameter_groups(model), lr=task.RATE)
    factor = partial(task.cosine, total=options.iterations // task.ACCUMULATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    sampler = DistributedSampler(train, shuffle=True, drop_last=True)
    loader = DataLoader(train, task.BATCH, sampler=sampler, drop_last=True, generator=torch.Generator())
    evaluated = DistributedSampler(validation, shuffle=False)
    validation_loader = DataLoader(validation, 64, sampler=evaluated, generator=torch.Generator())
    folder = options.out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    iteration = epoch = done = worse = 0
    best = math.inf
    if found := sorted(folder.glob("*.pt")):
        state = torch.load(found[-1], weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        iteration, epoch, done, worse, best = state["place"]
        torch.set_rng_state(state["generators"][rank])
    board = SummaryWriter(options.out / "board", purge_step=iteration + 1) if rank == 0 else None
    while iteration < options.iterations and worse < task.PATIENCE:
        sampler.set_epoch(epoch)
        for number, batch in enumerate(loader):
            if number < done:
                continue
            iteration, done = iteration + 1, number + 1
            is_last = iteration % task.ACCUMULATE == 0
            with contextlib.nullcontext() if is_last else model.no_sync():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = task.loss_of(model, batch)
                (loss / task.ACCUMULATE).backward()
            if is_last:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), task.CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if iteration % options.tell == 0 and rank == 0:
                board.add_scalar("train/loss", loss.item(), iteration)
                board.add_scalar("train/rate", schedule.get_last_lr()[0], iteration)
                board.add_scalar("train/norm", norm.item(), iteration)
                print(f"iteration {iteration}: loss {loss.item():.4f}", flush=True)
            if iteration % options.evaluate == 0:
                value = perplexity(model, validation_loader)
                worse, best = (0, value) if value < best else (worse + 1, best)
                if rank == 0:
                    board.add_scalar("val/perplexity", value, iteration)
                    print(f"iteration {iteration}: perplexity {value:.4f}", flush=True)
            if iteration % options.save == 0:
                parts = {"model": model.module, "optimizer": optimizer, "schedule": schedule}
                states = {name: part.state_dict() for name, part in parts.items()}
                save(folder, iteration, {**states, "place": (iteration, epoch, done, worse, best)})
            if iteration >= options.iterations or worse >= task.PATIENCE:
                break
        else:
            epoch, done = epoch + 1, 0
    if rank == 0:
        board.close()
        print("digest", task.digest(model.module))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(task.Options.read())
