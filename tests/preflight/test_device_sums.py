"""What a device computes in a preflight has one right answer, and a wrong one is seen."""

from __future__ import annotations

import torch

from allstep.preflight.device_sums import compute, is_product, products


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
