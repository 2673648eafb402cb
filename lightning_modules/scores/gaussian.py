"""Class-conditional Gaussians that share one covariance, and the Mahalanobis distance to their means."""

import logging
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.distributed import sum_over_processes
from lightning_modules.evidence import Evidence
from lightning_modules.scores.energy import EnergyScore
from lightning_modules.scores.score import read_tap

logger = logging.getLogger(__name__)


class ClassStatistics:
    """Counts, means and pooled within-class scatter of labelled features, streamed in O(KD + D^2) float64 numbers.

    Batches, and at the end processes, are merged by the shift of their means (Chan, Golub and LeVeque, 1983). Sums of
    squares would cancel where features lie far from the origin.

    Attributes:
        counts: (K,) samples of each class.
        means: (K, D), zero for a class without samples.
        scatter: (D, D), sum over samples of r r^T with r the sample minus the mean of its class.
    """

    def __init__(self, num_classes: int, num_features: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.means = torch.zeros(num_classes, num_features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Merge a batch of (B, D) features with labels (B,); B may be 0."""
        outside = labels[(labels < 0) | (labels >= len(self.counts))].unique()
        if len(outside):
            raise ValueError(f"labels must lie in 0..{len(self.counts) - 1}, this batch also holds {outside.tolist()}")
        features = features.detach().double()
        classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
        means = features.new_zeros(len(classes), features.shape[1]).index_add_(0, index, features) / counts[:, None]
        shift, before = means - self.means[classes], self.counts[classes]
        share = counts / (before + counts)
        rows = torch.cat([features - means[index], (before * share).sqrt()[:, None] * shift])
        self.scatter.addmm_(rows.T, rows)
        self.means[classes] += share[:, None] * shift
        self.counts[classes] += counts

    def reduce(self) -> None:
        """Merge the statistics of all processes; every process must call it and ends with the same."""
        counts = sum_over_processes(self.counts)
        means = sum_over_processes(self.counts[:, None] * self.means) / counts.clamp(min=1)[:, None]
        shift = self.counts.sqrt()[:, None] * (self.means - means)
        self.scatter = sum_over_processes(self.scatter + shift.T @ shift)
        self.counts, self.means = counts, means


def cholesky(covariance: Tensor) -> Tensor:
    """Factorise a (D, D) float64 covariance into L L^T, adding to its diagonal only what it takes.

    Raises:
        ValueError: it is not finite, zero, or not positive definite even with 1e-4 of its mean variance added.
    """
    if not covariance.isfinite().all():
        raise ValueError("the covariance holds NaN or infinity: so do the features it was fitted on")
    variance = covariance.diagonal().mean()
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for jitter in (0.0, *(10.0**exponent for exponent in range(-12, -3))):
        jittered = covariance + jitter * variance * identity
        factor, failure = torch.linalg.cholesky_ex(jittered)
        # A pivot this small is the rounding error of a zero: the factor exists by luck, and its inverse is noise.
        noise = len(covariance) * torch.finfo(covariance.dtype).eps * jittered.diagonal().max()
        if not failure and (factor.diagonal().square() > noise).all():
            if jitter:
                logger.warning("singular covariance: added %.0e of its mean variance to the diagonal", jitter)
            return factor
    raise ValueError(
        f"the {tuple(covariance.shape)} covariance cannot be factorised, not even with {jitter:.0e} of its mean "
        f"variance {float(variance):.3g} added to the diagonal; do the features vary within the classes?"
    )


def turn(directions: Tensor) -> Tensor:
    """Give each row of (R, D) the sign with which its entry of largest magnitude is positive.

    Singular and eigenvectors are then the same wherever they are computed, as far as their values differ.
    """
    return directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()


def squared_distances(points: Tensor, centroids: Tensor, absent: Tensor) -> Tensor:
    """Squared Euclidean distances of (B, D) points to (K, D) centroids: (B, K), infinite for the absent (K,) ones.

    One matrix product, after which the distance to the nearest centroid is computed anew from the difference and the
    others are counted from there: expanded squares cancel where centroids lie much farther apart than points from
    their centroid, which is what well trained features look like once they are whitened.
    """
    norms = centroids.square().sum(1).masked_fill(absent, math.inf)
    expanded = torch.addmm(norms, points, centroids.T, alpha=-2)
    least, nearest = expanded.min(1, keepdim=True)
    exact = (points - centroids[nearest.squeeze(1)]).square().sum(1, keepdim=True)
    return expanded - least + exact


class ClassGaussians(EnergyScore):
    """N(mu_c, Sigma) for each class, fitted in closed form: class means, one biased pooled covariance.

    Attributes:
        centre: (D,) mean of all features, rounded to the module's type.
        whitening: (D, D) lower triangular L^-1 with Sigma = L L^T; a subclass may keep other rows, (R, D).
        centroids: (K, R) whitened class means L^-1 (mu_c - centre), zero for a class without samples.
        log_prior: (K,) log share of each class in the training data, -inf for a class without samples.
    """

    passes = 1
    centre: Tensor
    whitening: Tensor
    centroids: Tensor
    log_prior: Tensor

    def __init__(self, tap: str, normalize: bool) -> None:
        super().__init__()
        self.tap, self.unit_length, self.taps = tap, normalize, frozenset({tap})
        self._statistics: ClassStatistics | None = None
        for name in ("centre", "whitening", "centroids", "log_prior"):
            self.register_buffer(name, torch.empty(0))

    def embed(self, evidence: Evidence) -> Tensor:
        """Return the (B, D) features that the Gaussians live on."""
        features = read_tap(evidence, self.tap).to(self.centre.dtype)
        return F.normalize(features, dim=1) if self.unit_length else features

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Take in a batch; K is the width of its logits."""
        features = self.embed(evidence)
        if self._statistics is None:
            self._statistics = ClassStatistics(evidence.logits.shape[1], features.shape[1], features.device)
        self._statistics.update(features, labels)

    def _finalize(self) -> None:
        if self._statistics is None:
            raise RuntimeError(f"{type(self).__name__} has seen no training data: call update before finalize")
        self._statistics.reduce()
        counts, means, scatter = self._statistics.counts, self._statistics.means, self._statistics.scatter
        total = counts.sum()
        if not total:
            raise RuntimeError(f"{type(self).__name__} has seen only empty batches of training data")
        factor = cholesky(scatter / total)
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        self._store(torch.linalg.solve_triangular(factor, identity, upper=False), means, counts / total)
        self._statistics = None

    def _store(self, whitening: Tensor, means: Tensor, shares: Tensor) -> None:
        """Round float64 parameters to the module's type: (R, D), (K, D), (K,)."""
        # Contiguous as it will be after a reload, for the sake of equal bits.
        self.whitening = whitening.to(self.whitening).contiguous()
        self.centre = (shares @ means).to(self.centre)
        # From the rounded centre and whitening, so that their rounding moves points and centroids alike.
        offsets = (means - self.centre.double()) * (shares > 0)[:, None]
        self.centroids = (offsets @ self.whitening.double().T).to(self.centroids)
        self.log_prior = shares.log().to(self.log_prior)

    def whiten(self, features: Tensor) -> Tensor:
        """Map (B, D) embedded features to (B, R), where Sigma is the identity."""
        return (features - self.centre) @ self.whitening.T

    def distances(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distances of (B, D) embedded features to the class means: (B, K)."""
        return squared_distances(self.whiten(features), self.centroids, self.log_prior.isneginf())


class Mahalanobis(ClassGaussians):
    """Squared Mahalanobis distance to the nearest class mean, min_c (z - mu_c)^T Sigma^-1 (z - mu_c).

    Higher = more OOD. Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
    Adversarial Attacks", NeurIPS 2018; on L2-normalised features, the supervised SSD of Sehwag et al., "SSD: A Unified
    Framework for Self-Supervised Outlier Detection", ICLR 2021.

    Args:
        tap: the features z.
        normalize: whether to divide each feature vector by its L2 norm first.
    """

    def __init__(self, tap: str = "penultimate", normalize: bool = False) -> None:
        super().__init__(tap, normalize)

    def energy(self, features: Tensor) -> Tensor:
        """Distance (B,) of (B, D) embedded features."""
        return self.distances(features).amin(1)
