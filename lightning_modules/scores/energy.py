"""Scores that are energies of features: what a sampler can draw from, and a residual can correct."""

from abc import abstractmethod

import torch
from torch import Tensor

from backbones.backbone import Backbone
from lightning_modules.evidence import Evidence
from lightning_modules.scores.head import HeadScore
from lightning_modules.scores.score import InputScore, Score


class EnergyScore(Score):
    """A score that is an energy of features, -log of a density up to a constant; higher = more OOD.

    Attributes:
        unit_length: whether the embedded features have length 1.
    """

    unit_length: bool = False

    @abstractmethod
    def embed(self, evidence: Evidence) -> Tensor:
        """Return the (B, D) features on which the energy is defined."""

    @abstractmethod
    def energy(self, features: Tensor) -> Tensor:
        """Energy (B,) of (B, D) embedded features; differentiable."""

    def gradient(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Gradient (B, D) of the energy of each row with respect to the row.

        Args:
            features: (B, D) embedded features.
            classes: (B,); then of the energy given the class, which few energies have.
        """
        if classes is not None:
            raise ValueError(f"{type(self).__name__} has no energy of a class: leave conditional off")
        with torch.enable_grad():
            features = features.detach().requires_grad_()
            return torch.autograd.grad(self.energy(features).sum(), features)[0]

    def sample(
        self, number: int, shares: Tensor | None = None, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw from the density: the classes (number,) and the embedded features (number, D).

        Args:
            number: of draws.
            shares: (K,) how frequent each class is to be; where not given, as in the training data.
            temperature: how much farther than usual from the mean of their class draws lie, on the whole.
        """
        raise ValueError(f"{type(self).__name__} cannot be drawn from: let chains start elsewhere (proposal)")

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        return self.energy(self.embed(evidence))


class FeatureEnergy(HeadScore, EnergyScore):
    """A score of logits and penultimate features as an energy of these features alone: the head makes the logits.

    Around ``Energy``, this is HEAT's prior of energy logits, E(z) = -logsumexp_c (W z + b)_c. Higher = more OOD.

    Args:
        score: differentiable, of logits or penultimate features or both.
    """

    def __init__(self, score: Score) -> None:
        super().__init__()
        name = type(score).__name__
        if isinstance(score, InputScore):
            raise ValueError(f"{name} runs the network on images, it is no energy of features")
        if others := sorted(score.taps - {"penultimate"}):
            raise ValueError(f"{name} reads {', '.join(others)}, not only logits and penultimate features")
        self.score, self.passes = score, score.passes

    def bind(self, backbone: Backbone | None) -> None:
        """Copy the head, for oneself and for the score."""
        super().bind(backbone)
        self.score.bind(backbone)

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Fit the score."""
        self.score.update(evidence, labels)

    def _finalize(self) -> None:
        self.score.finalize()

    def embed(self, evidence: Evidence) -> Tensor:
        """Return the (B, D) penultimate features as they are."""
        return self.features(evidence)

    def energy(self, features: Tensor) -> Tensor:
        """Energy (B,) of (B, D) features."""
        return self.score(Evidence(self.logits(features), {"penultimate": features}, {}, None))
