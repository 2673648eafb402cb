"""What a classifier is to say of auxiliary outliers."""

from abc import ABC, abstractmethod

from torch import Tensor


class OutlierLoss(ABC):
    """A loss on the logits of a batch that holds ID images and outliers, or only one kind, or nothing."""

    @abstractmethod
    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return a scalar with a live graph.

        Args:
            logits: (B, K).
            labels: (B,), -1 = outlier.
        """


class UniformTarget(OutlierLoss):
    """Outliers are to have all classes alike: their cross-entropy against the uniform distribution, at least log K.

    Hendrycks, Mazeika and Dietterich, "Deep Anomaly Detection with Outlier Exposure", ICLR 2019.

    Args:
        weight: of the mean over outliers.
    """

    def __init__(self, weight: float = 0.5) -> None:
        self.weight = _checked(weight)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted mean over outliers."""
        outliers = logits[labels < 0]
        return self.weight * _mean(outliers.logsumexp(1) - outliers.mean(1), logits)


class EnergyMargins(OutlierLoss):
    """ID images are to have an energy of at most ``m_in``, outliers one of at least ``m_out``: squared hinges.

    The energy of an image is -logsumexp of its logits. Liu, Wang, Owens and Li, "Energy-based Out-of-distribution
    Detection", NeurIPS 2020.

    Args:
        m_in: below it an ID image costs nothing.
        m_out: above it an outlier costs nothing.
        weight: of the sum of both means, over ID images and over outliers.
    """

    def __init__(self, m_in: float = -25.0, m_out: float = -7.0, weight: float = 0.1) -> None:
        if m_in > m_out:
            raise ValueError(f"ID images have the lower energy: m_in must not be above m_out, got {m_in} and {m_out}")
        self.m_in, self.m_out, self.weight = m_in, m_out, _checked(weight)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted sum of both means."""
        energy, known = -logits.logsumexp(1), labels >= 0
        inside = _mean((energy[known] - self.m_in).relu().square(), logits)
        outside = _mean((self.m_out - energy[~known]).relu().square(), logits)
        return self.weight * (inside + outside)


def scale_slope(logits: Tensor, labels: Tensor) -> Tensor:
    """How fast the loss of outliers would change if their logits f were scaled: mean of f's mean - sum softmax(f) f.

    The derivative by s, at s = 1, of the cross-entropy of the logits s f against the uniform distribution is minus
    this; its square is what the perturbation of Wang et al., "Out-of-distribution Detection with Implicit Outlier
    Transformation", ICLR 2023, is made from, here without differentiating twice.

    Args:
        logits: (B, K).
        labels: (B,), -1 = outlier: other rows do not count.

    Returns:
        A scalar, at most 0; 0 with a live graph where there is no outlier.
    """
    outliers = logits[labels < 0]
    return _mean(outliers.mean(1) - (outliers.softmax(1) * outliers).sum(1), logits)


def _mean(values: Tensor, logits: Tensor) -> Tensor:
    """Average; 0 with a live graph where a batch, or this process's share of it, has no such rows."""
    return values.mean() if len(values) else logits.sum() * 0


def _checked(weight: float) -> float:
    if weight < 0:
        raise ValueError(f"the weight of the outliers must be at least 0, got {weight}")
    return weight
