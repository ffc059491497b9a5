"""One device of a preflight, in a process of its own that is run by this file's path: it computes, and then reduces.

Contract: the arguments are the rank on this machine, whether to serve the store ("store" or "") and whether to compute
wrongly on purpose ("wrong" or ""). A line of JSON says what the device computed. Then a line of JSON is waited for,
with rank, size, host and port of an all-reduce of all devices, and a last line says what came of that. The end of
standard input is the end.

What is computed has one right answer in every order of adding: matrices of small integers, whose products and partial
sums the format holds exactly, in TF32 and bfloat16 too. So devices of different models can be compared bit by bit.
Freivalds' check (Freivalds 1977, "Probabilistic machines can use less running time") confirms the products on the
processor in integers, which tells who is right where two devices differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # a name of torch that its types leave out

SIZE = 512
ROUNDS = 4
PATIENCE = timedelta(seconds=15)


def choose_device(local_rank: int) -> torch.device:
    """The device that a rank would use."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or kind.type == "mps":  # which has no float64, and no second rank
        return torch.device("cpu")
    index = local_rank % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)


def device_name(device: torch.device) -> str:
    """What a device's driver calls it, where torch tells, or its type."""
    if device.type == "cpu":
        return "cpu"
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if ask is None else str(ask(device))


def backend_for(device: torch.device) -> str:
    """What the ranks of such devices would reduce over."""
    try:
        return dist.get_default_backend_for_device(device.type)
    except ValueError:  # its maker registered none
        return "gloo"


def products(device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Matrices of integers and their product on the device, in each format; all on the processor, as integers."""
    index = torch.arange(SIZE * SIZE, dtype=torch.int64).reshape(SIZE, SIZE)
    wide = (index * 7919 + 104729) % 17 - 8, (index * 6007 + index // 97) % 13 - 6
    # In bfloat16 integers up to 256 are exact, so there only 256 products of -1, 0 and 1 are added.
    narrow = wide[0][:256, :256].sign(), wide[1][:256, :256].sign()
    found = []
    formats = [(torch.float32, wide)]
    if device.type in ("cpu", "cuda"):  # some accelerators have no float64
        formats.append((torch.float64, wide))
    if device.type != "cpu":
        formats.append((torch.bfloat16, narrow))
    for kind, (left, right) in formats:
        there = left.to(device, kind), right.to(device, kind)
        product = there[0] @ there[1]
        found.append((left, right, product.to("cpu", torch.int64)))
    return found


def is_product(left: torch.Tensor, right: torch.Tensor, product: torch.Tensor) -> bool:
    """Freivalds' check with a vector of small integers."""
    vector = torch.arange(right.shape[1], dtype=torch.int64) * 31 % 101
    return torch.equal(product @ vector, left @ (right @ vector))


def compute(device: torch.device, *, wrong: bool) -> tuple[str, bool]:
    """The sum of all bits that the device computed, and whether the processor confirms it."""
    digest, exact = hashlib.sha256(), True
    for _ in range(ROUNDS):
        for left, right, product in products(device):
            if wrong:
                product[3, 5] += 1  # the rehearsed fault
            exact = exact and is_product(left, right, product)
            digest.update(product.numpy().tobytes())
    return digest.hexdigest(), exact


def reduce(order: dict[str, Any], device: torch.device, served: Any) -> str:
    """Take part in the all-reduce; return what is wrong with it, or ""."""
    rank, size = int(order["rank"]), int(order["size"])
    store = served or TCPStore(order["host"], int(order["port"]), is_master=False, timeout=PATIENCE)
    backend = backend_for(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    carrier = torch.device("cpu") if backend == "gloo" else device
    values = torch.arange(1024, dtype=torch.float32, device=carrier) % 97 + rank
    dist.all_reduce(values)
    wanted = (torch.arange(1024) % 97 * size + size * (size - 1) // 2).float()
    return "" if torch.equal(values.cpu(), wanted) else "the all-reduce gave it wrong sums"


def main(local_rank: int, *, serves: bool, wrong: bool) -> None:
    """Compute, say what, and reduce when told to."""
    device = choose_device(local_rank)
    digest, exact = compute(device, wrong=wrong)
    served = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE) if serves else None
    port = served.port if served is not None else 0
    print(json.dumps({"device": device_name(device), "digest": digest, "exact": exact, "store": port}), flush=True)
    line = sys.stdin.readline()
    if line.strip():
        try:
            problem = reduce(json.loads(line), device, served)
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(json.dumps({"problem": problem}), flush=True)
        sys.stdin.readline()  # the store is there until all have ended
    os._exit(0)  # without taking the group apart, for which the others might have to be waited for


if __name__ == "__main__":
    torch.set_num_threads(1)  # all devices of a machine compute at once
    main(int(sys.argv[1]), serves=sys.argv[2] == "store", wrong=sys.argv[3] == "wrong")
