"""Energies of the head's answer to reshaped activations, or of a sparser head."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.evidence import Evidence
from lightning_modules.scores.head import HeadScore
from lightning_modules.scores.logits import energy
from lightning_modules.scores.prototypes import RunningMeans
from lightning_modules.scores.score import read_tap


def largest(features: Tensor, percentile: float) -> Tensor:
    """Mark the D - round(D * percentile / 100) largest entries of each row, among equals the first: (B, D) bool.

    >>> largest(torch.tensor([[1.0, 3.0, 0.0, 3.0, 1.0]]), percentile=40).int()
    tensor([[1, 1, 0, 1, 0]], dtype=torch.int32)
    """
    width = features.shape[1]
    kept = width - round(width * percentile / 100)
    if kept < 1:
        raise ValueError(f"percentile {percentile} leaves none of the {width} activations: it must be lower")
    # A stable sort, because topk leaves open which of several equal entries it takes.
    order = features.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(features, dtype=torch.bool).scatter_(1, order[:, :kept], True)


def sharpness(features: Tensor, kept: Tensor) -> Tensor:
    """Factor exp(sum of a row / sum of its kept entries): (B, 1); 1 where the kept ones do not add up to more than 0.

    With n of D entries kept, it is exp(D / n) at most.
    """
    whole, part = features.sum(1, keepdim=True), (features * kept).sum(1, keepdim=True)
    return torch.where(part > 0, whole / part, 0).exp()


def ash(features: Tensor, percentile: float, variant: str) -> Tensor:
    """Prune (B, D) activations and, for variants ``b`` and ``s``, make up for it; see ``ASH``."""
    kept = largest(features, percentile)
    if variant == "b":
        return kept * (features.sum(1, keepdim=True) / kept.sum(1, keepdim=True))
    return features * kept * (sharpness(features, kept) if variant == "s" else 1)


def scale(features: Tensor, percentile: float) -> Tensor:
    """Scale all (B, D) activations of a row by its sharpness, without pruning; see ``SCALE``."""
    return features * sharpness(features, largest(features, percentile))


class ASH(HeadScore):
    """Energy of pruned activations, -logsumexp_c(W ash(z) + b)_c; higher = more OOD.

    W and b are the network's head, z its penultimate features, non-negative in the paper. In each vector the
    D - round(D * percentile / 100) largest of D entries survive and the others become 0. Variant ``p`` leaves it at
    that; ``b`` spreads the sum before pruning evenly over the survivors; ``s`` multiplies them by exp(sum before /
    sum after). Djurisic et al., "Extremely Simple Activation Shaping for Out-of-Distribution Detection", ICLR 2023.

    Args:
        variant: ``p``, ``b`` or ``s``.
        percentile: share of the entries to prune, in [0, 100) percent.
    """

    def __init__(self, variant: Literal["p", "b", "s"] = "s", percentile: float = 65.0) -> None:
        super().__init__()
        if variant not in ("p", "b", "s"):
            raise ValueError(f"ASH knows the variants p, b and s, not {variant!r}")
        self.variant, self.percentile = variant, _checked(percentile)

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        return energy(self.logits(ash(self.features(evidence), self.percentile, self.variant)))


class SCALE(HeadScore):
    """Energy of scaled activations, -logsumexp_c(W z exp(s1 / s2) + b)_c; higher = more OOD.

    W and b are the network's head, z its penultimate features, non-negative in the paper, s1 the sum of a vector's
    entries and s2 that of its D - round(D * percentile / 100) largest. Nothing is pruned. Xu et al., "Scaling for
    Training Time and Post-hoc Out-of-distribution Detection Enhancement", ICLR 2024.

    Args:
        percentile: share of the entries that s2 leaves out, in [0, 100) percent.
    """

    def __init__(self, percentile: float = 85.0) -> None:
        super().__init__()
        self.percentile = _checked(percentile)

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        return energy(self.logits(scale(self.features(evidence), self.percentile)))


class DICE(HeadScore):
    """Energy of a sparser head, -logsumexp_c((M * W) z + b)_c; higher = more OOD.

    W and b are the network's head, z its penultimate features. M keeps the weights whose contribution W_cj m_j, with m
    the mean of the ID training features, lies strictly above the ``percentile`` of all K x D contributions (linear
    between order statistics, as in NumPy). Sun and Li, "DICE: Leveraging Sparsification for Out-of-Distribution
    Detection", ECCV 2022.

    Args:
        percentile: share of the weights to drop, in [0, 100) percent; HEAT has 90 on CIFAR-10, 5 on CIFAR-100 and 70
            on ImageNet.

    Attributes:
        mask: M, (K, D) bool.
    """

    passes = 1
    mask: Tensor

    def __init__(self, percentile: float = 90.0) -> None:
        super().__init__()
        self.percentile = _checked(percentile)
        self._means = RunningMeans()
        self.register_buffer("mask", torch.empty(0, dtype=torch.bool))

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Add a batch's features; the labels are not used."""
        self._means.update(read_tap(evidence, "penultimate"), torch.zeros_like(labels), num_groups=1)

    def _finalize(self) -> None:
        contributions = self.weight.double() * self._means.reduce()
        threshold = np.percentile(contributions.cpu().numpy(), self.percentile)
        self.mask = contributions > float(threshold)

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        return energy(F.linear(self.features(evidence), self.weight * self.mask, self.bias))


def _checked(percentile: float) -> float:
    if not 0 <= percentile < 100:
        raise ValueError(f"the percentile must lie in [0, 100), not be {percentile}")
    return percentile
