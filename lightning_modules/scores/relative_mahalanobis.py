"""Mahalanobis distance to the nearest class, less that to all classes together."""

import torch
from torch import Tensor

from lightning_modules.scores.gaussian import ClassGaussians, squared_distances, turn


class RelativeMahalanobis(ClassGaussians):
    """Relative Mahalanobis distance, min_c (z - mu_c)^T Sigma^-1 (z - mu_c) - (z - mu)^T T^-1 (z - mu).

    mu and T are the mean and the biased covariance of all training features, regardless of class. Higher = more OOD.
    Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", ICML 2021 workshop on
    Uncertainty and Robustness in Deep Learning.

    T is Sigma plus the covariance of the class means. Where Sigma is whitened, T is thus 1 + lambda_i along the
    principal directions of the whitened class means, and 1 across them: there, both distances agree and cancel. Only
    the principal directions are kept, R < K of them.

    Args:
        tap: the features z.
        normalize: whether to divide each feature vector by its L2 norm first.

    Attributes:
        background: (R,) whitened mu - centre.
        shrinkage: (R,) 1 / sqrt(1 + lambda_i).
    """

    background: Tensor
    shrinkage: Tensor

    def __init__(self, tap: str = "penultimate", normalize: bool = False) -> None:
        super().__init__(tap, normalize)
        for name in ("background", "shrinkage"):
            self.register_buffer(name, torch.empty(0))

    def _store(self, whitening: Tensor, means: Tensor, shares: Tensor) -> None:
        mean = shares @ means
        offsets = shares.sqrt()[:, None] * (means - mean) @ whitening.T
        _, spread, directions = torch.linalg.svd(offsets, full_matrices=False)
        # In units of a class's standard deviation; what is closer together than this differs by rounding errors.
        rank = int((spread > 1e-7).sum())
        spread, directions = spread[:rank], turn(directions[:rank])
        super()._store(directions @ whitening, means, shares)
        self.background = (self.whitening.double() @ (mean - self.centre.double())).to(self.background)
        self.shrinkage = (1 + spread.square()).rsqrt().to(self.shrinkage)

    def energy(self, features: Tensor) -> Tensor:
        """Difference (B,) of the distances of (B, D) embedded features."""
        points = self.whiten(features)
        nearest = squared_distances(points, self.centroids, self.log_prior.isneginf()).amin(1)
        return nearest - ((points - self.background) * self.shrinkage).square().sum(1)
