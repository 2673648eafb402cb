"""A class density and a reconstruction error as one score."""

import torch
from torch import Tensor

from lightning_modules.distributed import gather_rows
from lightning_modules.evidence import Evidence
from lightning_modules.scores.class_density import ClassDensity, weighted_score
from lightning_modules.scores.score import Score, read_tap

ERROR = "reconstruction_error"  # the tap, (B, 1)


def check_scales(ceiling: Tensor, largest_error: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest log-likelihood and error of some images, or raise a ``ValueError`` where neither can scale."""
    if not ceiling.isfinite() or not 0 < largest_error < torch.inf:
        raise ValueError(
            f"the largest log-likelihood and reconstruction error of all images, {float(ceiling)} and "
            f"{float(largest_error)}, are to weigh others and cannot: did the training or the autoencoder diverge?"
        )
    return ceiling, largest_error


class WeightedDensity(Score):
    """The score of a ``ClassDensity``, weighted by the error with which an image was reconstructed.

    w (A + 1 - min(l, A)) with l the largest class log-likelihood, A its maximum over the ID training images and w the
    error over the largest one there; higher = more OOD. Dinari and Freifeld, "Variational- and Metric-based Deep Latent
    Space for Out-of-Distribution Detection", UAI 2022.

    Args:
        density: of the classes; it is fitted in the first pass, A and the largest error in the second.

    Attributes:
        ceiling: A.
        largest_error: over the ID training images.
    """

    ceiling: Tensor
    largest_error: Tensor

    def __init__(self, density: ClassDensity) -> None:
        super().__init__()
        self.density, self.passes = density, density.passes + 1
        self.taps = density.taps | {ERROR}
        for name in ("ceiling", "largest_error"):
            self.register_buffer(name, torch.tensor(-torch.inf))

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Fit the density, and in the second pass look for the maxima."""
        if not self.density.fitted:
            self.density.update(evidence, labels)
        elif len(labels):
            self.ceiling = self.ceiling.maximum(-self.density(evidence).amin())
            self.largest_error = self.largest_error.maximum(read_tap(evidence, ERROR).amax())

    def _finalize(self) -> None:
        if not self.density.fitted:
            self.density.finalize()
            return
        scales = gather_rows(torch.stack([self.ceiling, self.largest_error])[None]).amax(0)
        self.ceiling, self.largest_error = check_scales(*scales)

    def weigh(self, log_likelihood: Tensor, error: Tensor) -> Tensor:
        """Score (B,) from largest class log-likelihoods (B,) and errors (B,)."""
        return weighted_score(log_likelihood, error, self.ceiling, self.largest_error)

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        return self.weigh(-self.density(evidence), read_tap(evidence, ERROR).squeeze(1))
