"""Scores that read the class logits alone."""

from torch import Tensor

from lightning_modules.evidence import Evidence
from lightning_modules.scores.score import Score, widen


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Free energy -T logsumexp_c(logits_c / T) of (B, K) logits: (B,), higher = more OOD."""
    return -temperature * (widen(logits) / temperature).logsumexp(1)


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
