"""A score around another score, which changes what the other gets to see."""

from abc import abstractmethod

from torch import Tensor

from backbones.backbone import Backbone
from lightning_modules.evidence import Evidence
from lightning_modules.scores.energy import EnergyScore
from lightning_modules.scores.score import InputScore, Score


class Wrapper(EnergyScore):
    """Fits itself in a first pass, then hands the evidence that it has changed on to a score of its own.

    A subclass gives ``learn``, ``conclude``, and ``transform`` or ``relabel``.

    Args:
        score: the inner score; it must read ``tap``.
        tap: the features that are learned from.
    """

    score: Score

    def __init__(self, score: Score, tap: str) -> None:
        super().__init__()
        name, inner = type(self).__name__, type(score).__name__
        if isinstance(score, InputScore):
            raise ValueError(f"{name} changes the evidence, but {inner} makes its own from the images")
        if tap not in score.taps:
            reads = ", ".join(sorted(score.taps)) or "no features"
            raise ValueError(f"{name} is about {tap}, which {inner} does not read: it reads {reads}")
        self.score, self.tap, self.taps, self.passes = score, tap, score.taps, 1 + score.passes

    @abstractmethod
    def learn(self, evidence: Evidence, labels: Tensor) -> None:
        """Take in a batch of the first pass."""

    @abstractmethod
    def conclude(self) -> None:
        """End the first pass: reduce over processes and store the result in buffers."""

    def transform(self, evidence: Evidence) -> Evidence:
        """Return the evidence for the inner score."""
        return evidence

    def relabel(self, evidence: Evidence, labels: Tensor) -> Tensor:
        """Return the labels (B,) that the inner score is fitted with."""
        return labels

    def bind(self, backbone: Backbone | None) -> None:
        """Bind the inner score."""
        self.score.bind(backbone)

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Learn from a batch, or in later passes hand it on."""
        if int(self.finished):
            self.score.update(self.transform(evidence), self.relabel(evidence, labels))
        else:
            self.learn(evidence, labels)

    def _finalize(self) -> None:
        if int(self.finished):
            self.score.finalize()
        else:
            self.conclude()

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        return self.score(self.transform(evidence))

    @property
    def unit_length(self) -> bool:  # type: ignore[override]
        """Whether the features that the inner energy is defined on have length 1."""
        return self._energy.unit_length

    def embed(self, evidence: Evidence) -> Tensor:
        """Return the features on which the inner energy is defined."""
        return self._energy.embed(self.transform(evidence))

    def energy(self, features: Tensor) -> Tensor:
        """Inner energy (B,) of embedded features."""
        return self._energy.energy(features)

    def gradient(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Gradient (B, D) of the inner energy."""
        return self._energy.gradient(features, classes)

    def sample(
        self, number: int, shares: Tensor | None = None, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw from the inner density."""
        return self._energy.sample(number, shares, temperature)

    @property
    def _energy(self) -> EnergyScore:
        if not isinstance(self.score, EnergyScore):
            name, inner = type(self).__name__, type(self.score).__name__
            raise ValueError(f"{inner} is no energy of features, and so {name} around it is none either")
        return self.score
