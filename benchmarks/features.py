"""Features with known structure, for the benchmarks that score features without a network."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.evidence import Evidence
from lightning_modules.scores.score import Score

STREAMED = 200  # rows of a batch while fitting


class Gaussians(NamedTuple):
    """Training features whose classes have the same covariance exactly, so that shared and per-class fits agree.

    Attributes:
        means: (C, D).
        residuals: (M, D), the same in each class.
    """

    means: Tensor
    residuals: Tensor

    @property
    def covariance(self) -> Tensor:
        """The biased (D, D) covariance of each class, and of all pooled, in float64."""
        residuals = self.residuals.double()
        residuals = residuals - residuals.mean(0)
        return residuals.T @ residuals / len(residuals)

    @property
    def centroids(self) -> Tensor:
        """The (C, D) sample means of the classes in float64."""
        return self.means.double() + self.residuals.double().mean(0)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (features, labels), each row mixing all classes as training batches do."""
        for rows in self.residuals.split(max(1, STREAMED // len(self.means))):
            features = (rows[:, None] + self.means).flatten(0, 1)
            yield features, torch.arange(len(self.means)).repeat(len(rows))


def gaussians(classes: int, width: int, per_class: int) -> Gaussians:
    """Draw C class means and M residuals in D dimensions; M > D, else their covariance is singular."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    means = torch.randn(classes, width, generator=generator)
    return Gaussians(means, torch.randn(per_class, width, generator=generator) @ mix)


def queries(drawn: Gaussians, number: int) -> Tensor:
    """Draw (B, D) test features: half near the classes, half far."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(number, drawn.means.shape[1], generator=generator)
    return drawn.means[torch.arange(number) % len(drawn.means)] + noise * torch.tensor([1.0, 3.0]).repeat(number)[:number, None]


def evidence(features: Tensor, classes: int) -> Evidence:
    """Wrap features (B, D) as the evidence of a network of so many classes."""
    return Evidence(features.new_zeros(len(features), classes), {"penultimate": features}, {}, None)


def fit(score: Score, batches: Iterator[tuple[Tensor, Tensor]], classes: int) -> Score:
    """Stream batches into one of our scores."""
    for features, labels in batches:
        score.update(evidence(features, classes), labels)
    score.finalize()
    return score


def state_bytes(score: Score) -> int:
    """Size of what a fitted score keeps."""
    return sum(buffer.nbytes for buffer in score.buffers())
