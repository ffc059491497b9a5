"""What a device computes in a preflight has one right answer, and a wrong one is seen."""

from __future__ import annotations

import pytest
import torch

from allstep.preflight.agent import missing_device
from allstep.preflight.device_sums import backend_for, choose_device, compute, device_name, is_product, products


def test_products_are_exact_and_always_the_same() -> None:
    device = torch.device("cpu")
    for left, right, product in products(device):
        assert torch.equal(product, left @ right)
        assert is_product(left, right, product)
    assert compute(device, wrong=False) == compute(device, wrong=False)


def test_one_wrong_element_is_seen_by_the_sum_and_by_the_processor() -> None:
    device = torch.device("cpu")
    right, wrong = compute(device, wrong=False), compute(device, wrong=True)
    assert right[1]
    assert not wrong[1]
    assert right[0] != wrong[0]


def accelerator(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> list[int]:
    """A machine with so many devices of a type, made up; the indexes that are made current are listed."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    return chosen


@pytest.mark.parametrize(("kind", "backend"), [("cuda", "nccl"), ("xpu", "xccl"), ("privateuseone", "gloo")])
def test_a_rank_computes_on_its_accelerator_whoever_made_it(monkeypatch, kind, backend) -> None:
    chosen = accelerator(monkeypatch, kind, 4)
    device = choose_device(6)
    assert device == torch.device(kind, 2)
    assert chosen == [2]
    assert backend_for(device) == backend


def test_without_an_accelerator_for_ranks_it_is_the_cpu(monkeypatch) -> None:
    accelerator(monkeypatch, "mps", 1)
    assert choose_device(0) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert choose_device(0) == torch.device("cpu")
    assert (device_name(choose_device(0)), backend_for(choose_device(0))) == ("cpu", "gloo")


def test_a_torch_that_sees_none_of_the_gpus_of_its_ranks_is_a_problem() -> None:
    assert missing_device("cpu", ("0", "1")) == "torch finds no GPU, and ranks here are given 0, 1"
    assert missing_device("H100", ("0", "1")) == ""
    assert missing_device("cpu", ()) == ""
