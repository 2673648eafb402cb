"""A score on the leading principal components of features."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.evidence import Evidence
from lightning_modules.scores.gaussian import ClassStatistics, turn
from lightning_modules.scores.gradnorm import GradNorm
from lightning_modules.scores.head import HeadScore
from lightning_modules.scores.score import Score, read_tap
from lightning_modules.scores.wrapper import Wrapper


def principal_directions(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (D,), the largest first, and their directions as the rows of (D, D)."""
    variances, vectors = torch.linalg.eigh(covariance)
    return variances.flip(0), turn(vectors.T.flip(0))


class PCA(Wrapper):
    """Another score, fitted and computed on the leading principal components of the features.

    The features are centred on the ID training mean and projected on the leading eigenvectors of their covariance.
    Fitting takes O(D^2) numbers.

    Args:
        score: the other score.
        components: P, how many directions are kept.
        whiten: whether to divide each component by its standard deviation (unbiased) on the ID training data.
        normalize: whether to divide each feature vector by its L2 norm before all this. What the inner score does by
            itself comes after the projection.
        tap: the features.

    Attributes:
        mean: (D,).
        directions: (P, D), orthonormal rows, divided by the standard deviations if ``whiten``.
    """

    mean: Tensor
    directions: Tensor

    def __init__(
        self,
        score: Score,
        components: int = 128,
        whiten: bool = False,
        normalize: bool = False,
        tap: str = "penultimate",
    ) -> None:
        super().__init__(score, tap)
        if heads := [type(part).__name__ for part in score.modules() if isinstance(part, HeadScore | GradNorm)]:
            raise ValueError(f"{', '.join(heads)} classifies the features: it needs all of them, not components")
        if components < 1:
            raise ValueError(f"PCA keeps at least 1 component, not {components}")
        self.components, self.whiten, self.normalize = components, whiten, normalize
        self._statistics: ClassStatistics | None = None
        for name in ("mean", "directions"):
            self.register_buffer(name, torch.empty(0))

    def _embed(self, evidence: Evidence) -> Tensor:
        features = read_tap(evidence, self.tap).to(self.mean.dtype)
        return F.normalize(features, dim=1) if self.normalize else features

    def learn(self, evidence: Evidence, labels: Tensor) -> None:
        """Add a batch to mean and covariance."""
        features = self._embed(evidence)
        if self._statistics is None:
            if self.components > features.shape[1]:
                raise ValueError(
                    f"{self.tap} has {features.shape[1]} features, too few for {self.components} components"
                )
            self._statistics = ClassStatistics(1, features.shape[1], features.device)
        self._statistics.update(features, torch.zeros_like(labels))

    def conclude(self) -> None:
        """Store the mean and the directions."""
        if self._statistics is None:
            raise RuntimeError("PCA has seen no training data: call update before finalize")
        self._statistics.reduce()
        count, scatter = int(self._statistics.counts), self._statistics.scatter
        if count < 2:
            raise RuntimeError(f"PCA needs at least 2 training images, it has seen {count}")
        if not scatter.isfinite().all():
            raise ValueError("PCA cannot be fitted on features that hold NaN or infinity")
        variances, directions = (x[: self.components] for x in principal_directions(scatter / (count - 1)))
        if self.whiten:
            # In fewer directions than this, the variance is the rounding error of a zero.
            varying = int((variances > len(scatter) * torch.finfo(scatter.dtype).eps * variances[0]).sum())
            if varying < self.components:
                raise ValueError(
                    f"the features vary in {varying} directions only: PCA cannot whiten {self.components} components"
                )
            directions = directions / variances.sqrt()[:, None]
        self.mean = self._statistics.means[0].to(self.mean)
        self.directions = directions.to(self.directions).contiguous()
        self._statistics = None

    def transform(self, evidence: Evidence) -> Evidence:
        """Project the tap: (B, D) to (B, P)."""
        projected = (self._embed(evidence) - self.mean) @ self.directions.T
        return evidence._replace(features=evidence.features | {self.tap: projected})
