"""Energy after rectifying activations."""

import torch
from torch import Tensor

from lightning_modules.distributed import sum_over_processes
from lightning_modules.evidence import Evidence
from lightning_modules.scores.head import HeadScore
from lightning_modules.scores.logits import energy
from lightning_modules.scores.score import read_tap

BINS = 2**20
SHIFT = 12  # bits of a float32 below the bin: 11 of the mantissa's 23 remain


def histogram(values: Tensor) -> Tensor:
    """Count values in bins made of the upper 20 bits of a float32: (2^20,) int64, exact to add up.

    Read as integers, positive floats are ordered as they stand and negative ones in reverse; flipping the bits of the
    latter orders all. A bin spans 2^-11 of its lower edge. NaN and infinity are a ``ValueError``.
    """
    if not values.isfinite().all():
        raise ValueError("the activations hold NaN or infinity")
    bits = values.detach().float().flatten().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return torch.bincount((ordered >> SHIFT) + BINS // 2, minlength=BINS)


def histogram_quantile(counts: Tensor, quantile: float) -> Tensor:
    """Quantile of the values behind a ``histogram``, as a float64 scalar.

    As ``numpy.quantile`` does, it interpolates between the two order statistics around (n - 1) * quantile; each is
    placed linearly inside its bin, which is wrong by 2^-11 of its magnitude at most.
    """
    cumulated = counts.cumsum(0)
    position = quantile * (int(cumulated[-1]) - 1)
    ranks = torch.tensor([int(position), min(int(position) + 1, int(cumulated[-1]) - 1)], device=counts.device)
    bins = torch.searchsorted(cumulated, ranks, right=True)
    inside = (ranks - cumulated[bins] + counts[bins] + 0.5) / counts[bins].double()
    ordered = (torch.stack([bins, bins + 1]) - BINS // 2 << SHIFT).int()
    lower, upper = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32).double()
    below, above = torch.lerp(lower, upper, inside)
    return torch.lerp(below, above, position % 1)


class ReAct(HeadScore):
    """Energy of rectified activations, -logsumexp_c(W min(z, t) + b)_c; higher = more OOD.

    W and b are the network's head, z its penultimate features, t the ``quantile`` of all entries of the ID training
    features, exact to a relative 2^-11, or a number given. Sun, Guo and Li, "ReAct: Out-of-distribution Detection With
    Rectified Activations", NeurIPS 2021.

    Args:
        quantile: share of the ID activations that stay as they are, in (0, 1]; None with a fixed threshold.
        threshold: t itself, which needs no training data; None = take the quantile.

    Attributes:
        threshold: t.
    """

    threshold: Tensor

    def __init__(self, quantile: float | None = 0.95, threshold: float | None = None) -> None:
        super().__init__()
        if (quantile is None) == (threshold is None):
            raise ValueError(
                f"ReAct clips at a quantile or at a fixed threshold (then quantile: null), "
                f"but quantile is {quantile} and threshold is {threshold}"
            )
        if quantile is not None and not 0 < quantile <= 1:
            raise ValueError(f"the quantile must lie in (0, 1], not be {quantile}")
        self.quantile, self.passes = quantile, int(threshold is None)
        self._counts: Tensor | None = None
        self.register_buffer("threshold", torch.empty(0) if threshold is None else torch.tensor(float(threshold)))

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Count a batch's activations."""
        counts = histogram(read_tap(evidence, "penultimate"))
        self._counts = counts if self._counts is None else self._counts.add_(counts)

    def _finalize(self) -> None:
        if self.quantile is None:
            raise RuntimeError("ReAct with a fixed threshold has nothing to fit")
        if self._counts is None:
            raise RuntimeError("ReAct has seen no training data: call update before finalize")
        counts = sum_over_processes(self._counts)
        if not counts.any():
            raise RuntimeError("ReAct has seen only empty batches of training data")
        self.threshold = histogram_quantile(counts, self.quantile).to(self.threshold)
        self._counts = None

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        return energy(self.logits(self.features(evidence).minimum(self.threshold)))
