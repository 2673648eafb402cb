"""Scores that read the class logits alone."""

import torch
from torch import Tensor

from lightning_modules.evidence import Evidence
from lightning_modules.scores.score import Score, widen


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Free energy -T logsumexp_c(logits_c / T) of (B, K) logits: (B,), higher = more OOD."""
    return -temperature * (widen(logits) / temperature).logsumexp(1)


def generalized_entropy(logits: Tensor, gamma: float, top: int) -> Tensor:
    """Sum of (p_j (1 - p_j))^gamma over the ``top`` largest softmax probabilities of (B, K) logits: (B,).

    >>> generalized_entropy(torch.zeros(1, 4), gamma=0.5, top=2)  # 2 sqrt(1/4 * 3/4)
    tensor([0.8660])
    """
    log_p = widen(logits).log_softmax(1).sort(1, descending=True).values
    others = log_p[:, 1:]
    # 1 - p is added up from the others where p may be next to 1: a small gamma would magnify what cancels.
    log_rest = torch.cat([others.logsumexp(1, keepdim=True), (-others.exp()).log1p()], 1)
    return (gamma * (log_p + log_rest))[:, :top].exp().sum(1)


class MSP(Score):
    """Maximum softmax probability, -max_c softmax(logits)_c, in [-1, -1/K]; higher = more OOD.

    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
    Networks", ICLR 2017.
    """

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        return -widen(evidence.logits).softmax(1).amax(1)


class MaxLogit(Score):
    """Maximum logit, -max_c logits_c; higher = more OOD.

    Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022.
    """

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        return -widen(evidence.logits).amax(1)


class Energy(Score):
    """Free energy, -T logsumexp_c(logits_c / T); higher = more OOD.

    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020.

    Args:
        temperature: T > 0.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"the temperature of the energy must be positive, not {temperature}")
        self.temperature = temperature

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        return energy(evidence.logits, self.temperature)


class GEN(Score):
    """Generalised entropy, the sum of p_j^gamma (1 - p_j)^gamma over the M largest p = softmax(logits).

    Higher = more OOD. Liu, Lochman and Zach, "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection",
    CVPR 2023.

    Args:
        gamma: exponent > 0, in the paper below 1; the smaller, the more weight on small probabilities.
        top: M; all classes count where there are fewer.
    """

    def __init__(self, gamma: float = 0.1, top: int = 100) -> None:
        super().__init__()
        if gamma <= 0:
            raise ValueError(f"gamma of GEN must be positive, not {gamma}")
        if top < 1:
            raise ValueError(f"GEN adds up the largest probabilities, at least 1 of them, not {top}")
        self.gamma, self.top = gamma, top

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        return generalized_entropy(evidence.logits, self.gamma, self.top)
