"""What a latent space looks like, class by class, over an epoch of training."""

import math
from typing import Any

import torch
from torch import Tensor, nn

COURSE = ("margin", "sigma", "least_norm", "mean_norm", "greatest_norm", "least_distance")


class LatentStatistics(nn.Module):
    """Mean and covariance of each class over an epoch of a network that moves, and what its classes would reject.

    The finished statistics of one epoch hold through the next. They are in float64, the same on every process, and in
    the checkpoint, together with what an unfinished epoch has added up.

    Attributes:
        means: (K, L), zero before the first epoch has finished.
        covariances: (K, L, L), divided by the number of samples; the identity before the first epoch has finished.
        bounds: (K,) the log-likelihood below which an image is not of the class; -inf at first.
        course: (epochs, 6) of every epoch that has finished, as ``COURSE`` names the columns.

    Args:
        num_classes: K.
        latent_dim: L.
        lower_bound: share of the training samples that fall below the bound of their class.
    """

    means: Tensor
    covariances: Tensor
    bounds: Tensor
    course: Tensor
    counts: Tensor
    sums: Tensor
    moments: Tensor
    deviations: Tensor
    likelihoods: Tensor

    def __init__(self, num_classes: int, latent_dim: int, lower_bound: float = 0.05) -> None:
        super().__init__()
        if not 0 <= lower_bound < 1:
            raise ValueError(f"lower_bound is the share of training samples to reject, in [0, 1), not {lower_bound}")
        self.lower_bound = lower_bound
        means = torch.zeros(num_classes, latent_dim, dtype=torch.float64)
        self.register_buffer("means", means)
        self.register_buffer("covariances", torch.eye(latent_dim, dtype=torch.float64).repeat(num_classes, 1, 1))
        self.register_buffer("bounds", torch.full_like(means[:, 0], -math.inf))
        self.register_buffer("course", means.new_zeros(0, len(COURSE)))
        self._restart()

    @torch.no_grad()
    def update(self, latents: Tensor, labels: Tensor, deviations: Tensor) -> None:
        """Add a batch of (B, L) latents with labels (B,), and the (B, L) deviations of their posteriors.

        With several processes, every one of them is to give the batch of all.
        """
        latents = latents.double()
        if len(self.course):
            own = self.log_likelihoods(latents).gather(1, labels[:, None])
            self.likelihoods = torch.cat([self.likelihoods, torch.cat([labels[:, None].double(), own], 1)])
        members = nn.functional.one_hot(labels, len(self.means)).T.double()
        self.counts += members.sum(1)
        self.sums += members @ latents
        self.moments += (members[:, :, None] * latents).mT @ latents
        self.deviations += deviations.double().mean(1).sum()

    @torch.no_grad()
    def finish(self, margin: float) -> None:
        """End an epoch, whose loss has asked for ``margin``; a class that was not seen keeps its statistics."""
        seen = self.counts > 0
        means = self.sums[seen] / self.counts[seen, None]
        self.means[seen] = means
        self.covariances[seen] = self.moments[seen] / self.counts[seen, None, None] - means[:, :, None] * means[:, None]
        for label in self.likelihoods[:, 0].unique().long():
            values = self.likelihoods[self.likelihoods[:, 0] == label, 1]
            self.bounds[label] = values.sort().values[int(self.lower_bound * len(values))]
        norms, sigma = self.means.norm(dim=1), self.deviations / self.counts.sum()
        shape = [norms.amin(), norms.mean(), norms.amax(), nn.functional.pdist(self.means).amin()]
        row = torch.stack([torch.full_like(sigma, margin), sigma, *shape])
        self.course = torch.cat([self.course, row[None]])
        self._restart()

    def log_likelihoods(self, latents: Tensor) -> Tensor:
        """Log N(z; mean_c, covariance_c) of (B, L) latents: (B, K) in float64.

        A class whose covariance cannot be factorised counts as N(0, I).
        """
        factors, failures = torch.linalg.cholesky_ex(self.covariances)
        failed = (failures > 0) | ~factors.isfinite().all(2).all(1)
        identity = torch.eye(factors.shape[1], dtype=factors.dtype, device=factors.device)
        factors = torch.where(failed[:, None, None], identity, factors)
        offsets = latents.double() - self.means.masked_fill(failed[:, None], 0)[:, None]
        whitened = torch.linalg.solve_triangular(factors, offsets.mT, upper=False)
        log_scale = factors.diagonal(dim1=1, dim2=2).log().sum(1) + latents.shape[1] / 2 * math.log(2 * math.pi)
        return -(whitened.square().sum(1) / 2 + log_scale[:, None]).T

    def _restart(self) -> None:
        self.register_buffer("counts", torch.zeros_like(self.means[:, 0]))
        self.register_buffer("sums", torch.zeros_like(self.means))
        self.register_buffer("moments", torch.zeros_like(self.covariances))
        self.register_buffer("deviations", self.means.new_zeros(()))
        self.register_buffer("likelihoods", self.means.new_zeros(0, 2))  # of an epoch: label, log-likelihood

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("likelihoods", "course"):  # as long as what is stored
            if (stored := state_dict.get(prefix + name)) is not None:
                setattr(self, name, self.means.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
