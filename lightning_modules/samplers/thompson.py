"""Thompson sampling of a linear boundary between ID images and outliers, as POEM mines outliers by it.

Features z of ID images regress to one number, those of outliers to another, without an intercept: y = w.z + noise. A
draw of w from its posterior says by w.z = 0 where the boundary may be; the outliers nearest to it, of least |w.z|, are
those to learn from next. Ming, Fan and Li, "POEM: Out-of-Distribution Detection with Posterior Sampling", ICML 2022.
"""

import numpy as np
import torch
from torch import Tensor

from lightning_modules.distributed import sum_over_processes

MEAN_STD = 0.01  # of the mean of the prior


class BoundaryRegression:
    """What a Bayesian linear regression keeps of (N, D) features and their targets, however many, in float64.

    Attributes:
        gram: (D, D), the sum of z z' over the features.
        moment: (D,), the sum of z y.

    Args:
        width: D.
        device: where the sums lie.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.moment = torch.zeros(width, dtype=torch.float64, device=device)

    def update(self, features: Tensor, targets: Tensor, weight: float = 1.0) -> None:
        """Add (B, D) features with (B,) targets, each as if it came ``weight`` times."""
        features, targets = features.double(), targets.double()
        self.gram.addmm_(features.T, features, alpha=weight)
        self.moment.addmv_(features.T, targets, alpha=weight)

    def reduce(self) -> None:
        """Add up what all processes have seen; once, before ``posterior``."""
        self.gram, self.moment = sum_over_processes(self.gram), sum_over_processes(self.moment)

    def posterior(self, prior_variance: float, noise_variance: float) -> tuple[Tensor, Tensor]:
        """Return the mean (D,) of w, and the Cholesky factor L (D, D) of its precision L L', in float64.

        The precision is gram / noise_variance + 1 / prior_variance; the prior's mean counts as 0.

        Raises:
            ValueError: features that are not finite.
        """
        precision = self.gram / noise_variance
        precision.diagonal().add_(1 / prior_variance)
        if not precision.isfinite().all():
            raise ValueError("the boundary cannot be estimated: some features are not finite, training has diverged")
        factor = torch.linalg.cholesky(precision)
        mean = torch.cholesky_solve((self.moment / noise_variance)[:, None], factor).squeeze(1)
        return mean, factor


class ThompsonSampling:
    """Targets of the regression, and draws from its prior and posterior; random by a seed and an epoch alone.

    Args:
        confidence: the target of outliers, and minus that of ID images, before both are shifted by one draw of the
            noise.
        prior_variance: sigma, of each component of w.
        noise_variance: of the targets.
        covariance_scale: by which the posterior's covariance is multiplied: None = sigma, as in the authors' code; 1 is
            the covariance of the textbook.
    """

    def __init__(
        self,
        confidence: float = 3.9,
        prior_variance: float = 20.0,
        noise_variance: float = 0.5,
        covariance_scale: float | None = None,
    ) -> None:
        scale = prior_variance if covariance_scale is None else covariance_scale
        if min(prior_variance, noise_variance) <= 0 or scale < 0:
            raise ValueError(
                "variances must be above 0 and their scale at least 0, got "
                f"prior_variance={prior_variance}, noise_variance={noise_variance}, covariance_scale={scale}"
            )
        self.confidence, self.covariance_scale = confidence, scale
        self.prior_variance, self.noise_variance = prior_variance, noise_variance

    def targets(self, outliers: Tensor, seed: int) -> Tensor:
        """Return the targets of (B,) images, of which some are outliers, as float64."""
        shift = self.noise_variance**0.5 * float(np.random.default_rng((seed, 0)).standard_normal())
        return torch.where(outliers, self.confidence, -self.confidence).double() + shift

    def draw(self, regression: BoundaryRegression | None, width: int, seed: int, epoch: int) -> Tensor:
        """Draw w (D,), float32, from the posterior, or from the prior where nothing is known yet."""
        random = np.random.default_rng((seed, 1, epoch))
        noise = torch.from_numpy(random.standard_normal(width))
        if regression is None:
            mean = MEAN_STD * torch.from_numpy(random.standard_normal(width))
            return (mean + self.prior_variance**0.5 * noise).float()
        mean, factor = regression.posterior(self.prior_variance, self.noise_variance)
        # L'^-1 noise has the covariance (L L')^-1
        spread = torch.linalg.solve_triangular(factor.T, noise.to(factor)[:, None], upper=True).squeeze(1)
        return (mean + self.covariance_scale**0.5 * spread).float()


def least(scores: Tensor, count: int) -> Tensor:
    """Return the rows, in order, of the ``count`` smallest of (N,) scores; of equal ones the earlier.

    >>> least(torch.tensor([3.0, 1.0, 2.0, 1.0]), 2)
    tensor([1, 3])
    """
    return scores.argsort(stable=True)[:count].sort().values
