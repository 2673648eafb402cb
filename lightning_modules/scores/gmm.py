"""The mixture of class-conditional Gaussians that share one covariance: its energy, gradient and draws."""

import math

import torch
from torch import Tensor

from lightning_modules.scores.gaussian import ClassGaussians

FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)  # by which tempered draws multiply the temperature, one of them for each draw


def log_sum_exp(terms: Tensor) -> Tensor:
    """Logsumexp over the rows of (B, K) terms, of which each row has a finite one: (B,).

    Terms by more than 80 below the largest count as if they were 80 below it: exp(-80) = 2e-35 changes no digit of a
    float64, while exp spends its time on arguments that underflow.
    """
    largest = terms.amax(1)
    return largest + (terms - largest[:, None]).clamp_min(-80).exp().sum(1).log()


class GMMEnergy(ClassGaussians):
    """Negative log-density of the mixture, -logsumexp_c[log pi_c + log N(z; mu_c, Sigma)], constants included.

    Higher = more OOD. The prior energy of Lafon et al., "Hybrid Energy Based Model in the Feature Space for
    Out-of-Distribution Detection", ICML 2023.

    Args:
        tap: the features z.
        normalize: whether to divide each feature vector by its L2 norm first.
    """

    def __init__(self, tap: str = "penultimate", normalize: bool = True) -> None:
        super().__init__(tap, normalize)

    def energy(self, features: Tensor) -> Tensor:
        """Energy (B,) of (B, D) embedded features; differentiable."""
        return self._log_scale - log_sum_exp(self.log_prior - self.distances(features) / 2)

    def class_energy(self, features: Tensor, classes: Tensor) -> Tensor:
        """Energy (B,) of (B, D) embedded features given the class of each, -log N(z; mu_y, Sigma)."""
        return self._log_scale + (self.whiten(features) - self._centroids_of(classes)).square().sum(1) / 2

    def gradient(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Gradient (B, D) of ``energy``, or of ``class_energy``, in closed form."""
        points = self.whiten(features)
        if classes is not None:
            means = self._centroids_of(classes)
        else:
            # Without the squares of the points: they cancel, but far from all means they drown the rest.
            offsets = self.log_prior - self.centroids.square().sum(1) / 2
            means = torch.addmm(offsets, points, self.centroids.T).softmax(1) @ self.centroids
        return (points - means) @ self.whitening

    def sample(
        self, number: int, shares: Tensor | None = None, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw the classes (number,), then a point (number, D) of each one's Gaussian.

        Args:
            number: of draws.
            shares: (K,) how frequent each class is to be; where not given, as in the training data.
            temperature: each draw lies farther from the mean of its class than usual by this and by a factor of its
                own, one of ``FACTORS``.
        """
        classes = torch.multinomial(self.log_prior.exp() if shares is None else shares, number, replacement=True)
        noise = torch.randn(number, len(self.centre), dtype=self.centre.dtype, device=self.centre.device)
        if temperature is not None:
            factors = noise.new_tensor(FACTORS)[torch.randint(len(FACTORS), (number, 1), device=noise.device)]
            noise *= temperature * factors
        whitened = (self._centroids_of(classes) + noise).T
        return classes, self.centre + torch.linalg.solve_triangular(self.whitening, whitened, upper=False).T

    def _centroids_of(self, classes: Tensor) -> Tensor:
        """Whitened means (B, D) of classes (B,)."""
        if (absent := self.log_prior[classes].isneginf()).any():
            missing = classes[absent].unique().tolist()
            raise ValueError(f"the mixture has no Gaussian for classes {missing}: no training data of theirs were seen")
        return self.centroids[classes]

    @property
    def _log_scale(self) -> Tensor:
        """-log of a Gaussian's density at its mean."""
        return len(self.centre) / 2 * math.log(2 * math.pi) - self.whitening.diagonal().log().sum()
