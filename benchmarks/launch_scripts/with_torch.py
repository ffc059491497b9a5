"""A few steps with torch alone, as for torchrun."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

import marks


@record
def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        for step in range(1, marks.STEPS + 1):
            loss = model(torch.ones(4, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            marks.mark("first")
            if marks.strike(step):
                return
    finally:
        if marks.FAULT == "cleanup":
            del model, optimizer, loss  # which would keep the connections open
            dist.destroy_process_group()
        marks.clean_up()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
