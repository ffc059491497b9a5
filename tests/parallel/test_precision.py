"""Precision names become autocast contexts and scalers."""

from __future__ import annotations

import pytest
import torch

from allstep.errors import ParallelError
from allstep.parallel import autocast, grad_scaler


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_a_matrix_product_runs_in_the_precision_asked_for(precision, dtype):
    x = torch.randn(4, 4)
    with autocast("cpu", precision):
        assert (x @ x).dtype == dtype


def test_no_leaves_the_callers_autocast_on():
    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), autocast("cpu", "no"):
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize(("precision", "enabled"), [("no", False), ("fp16", True), ("bf16", False)])
def test_only_fp16_scales_the_loss(precision, enabled):
    scaler = grad_scaler("cpu", precision)
    assert scaler.is_enabled() is enabled
    assert (scaler.scale(torch.ones(())).item() != 1.0) is enabled


@pytest.mark.parametrize("make", [autocast, grad_scaler])
def test_an_unknown_precision_is_refused_by_name(make):
    with pytest.raises(ParallelError, match="precision is 'fp8'"):
        make("cpu", "fp8")
