"""A score on features without their largest activations."""

import torch
from torch import Tensor

from lightning_modules.distributed import sum_over_processes
from lightning_modules.evidence import Evidence
from lightning_modules.scores.react import histogram, histogram_quantile
from lightning_modules.scores.score import Score, read_tap
from lightning_modules.scores.wrapper import Wrapper


class Clipped(Wrapper):
    """Another score, fitted and computed on min(z, t), with t the ``quantile`` of all entries of the ID features z.

    t is exact to a relative 2^-11. The inner score normalises afterwards, if at all: around a ``Mahalanobis`` on
    normalised features, this is SSD with the rectified activations of Sun, Guo and Li, "ReAct: Out-of-distribution
    Detection With Rectified Activations", NeurIPS 2021. The energy of clipped features has a class of its own,
    ``ReAct``. Logits stay those of features as they are.

    Args:
        score: the other score.
        quantile: share of the ID activations that stay as they are, in (0, 1].
        tap: the features z.

    Attributes:
        threshold: t.
    """

    threshold: Tensor

    def __init__(self, score: Score, quantile: float = 0.95, tap: str = "penultimate") -> None:
        super().__init__(score, tap)
        if not 0 < quantile <= 1:
            raise ValueError(f"the quantile must lie in (0, 1], not be {quantile}")
        self.quantile = quantile
        self._counts: Tensor | None = None
        self.register_buffer("threshold", torch.empty(0))

    def learn(self, evidence: Evidence, labels: Tensor) -> None:
        """Count a batch's activations."""
        counts = histogram(read_tap(evidence, self.tap))
        self._counts = counts if self._counts is None else self._counts.add_(counts)

    def conclude(self) -> None:
        """Store the threshold."""
        if self._counts is None:
            raise RuntimeError("Clipped has seen no training data: call update before finalize")
        counts = sum_over_processes(self._counts)
        if not counts.any():
            raise RuntimeError("Clipped has seen only empty batches of training data")
        self.threshold = histogram_quantile(counts, self.quantile).to(self.threshold)
        self._counts = None

    def transform(self, evidence: Evidence) -> Evidence:
        """Clip the tap."""
        features = read_tap(evidence, self.tap).to(self.threshold.dtype).minimum(self.threshold)
        return evidence._replace(features=evidence.features | {self.tap: features})
