"""How far generated samples are from real ones: torchmetrics' Fréchet distance, fed with both in one update.

Contract: a torchmetrics metric; its states are sums over samples (of features and of their products, in float64), so
that the distance over ranks is that of all samples. The extractor runs on each rank's own samples, in evaluation mode
and without gradients, and is then in the mode in which it was, module by module. Inception score needs nothing of
allstep: give torchmetrics' `InceptionScore` to `Metrics`, with an extractor in evaluation mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance


class FrechetDistance(FrechetInceptionDistance):
    """Fréchet distance between the features of real and of generated samples.

    As in Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, 2017.

    Args:
        extractor: from samples, as `update` is given them, to features (n, num_features). With Inception v3 the result
            is the Fréchet inception distance.
        num_features: features a sample.
        options: further arguments of torchmetrics' `FrechetInceptionDistance`.
    """

    def __init__(self, extractor: nn.Module, num_features: int, **options: Any) -> None:
        super().__init__(feature=_Extractor(extractor, num_features), **options)

    def update(self, fake: torch.Tensor, real: torch.Tensor) -> None:  # type: ignore[override]
        """Take generated and real samples in, of any numbers."""
        super().update(real, real=True)
        super().update(fake, real=False)


class _Extractor(nn.Module):
    """The user's module beside the number of its features, in evaluation mode while it is called."""

    def __init__(self, extractor: nn.Module, num_features: int) -> None:
        super().__init__()
        self.extractor = extractor
        self.num_features = num_features

    @torch.no_grad()
    def forward(self, samples: torch.Tensor) -> Any:
        # Module by module: some of them may be frozen in evaluation mode while the rest trains.
        training = [module for module in self.extractor.modules() if module.training]
        self.extractor.eval()
        try:
            return self.extractor(samples)
        finally:
            for module in training:
                module.training = True
