"""Mahalanobis distances of several layers, combined by how they tell adversaries from ID images."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.backbone import Backbone
from lightning_modules.evidence import Evidence
from lightning_modules.scores.gaussian import Mahalanobis
from lightning_modules.scores.row_sample import RowSample
from lightning_modules.scores.score import InputScore, widen


class LayeredMahalanobis(InputScore):
    """Weighted sum of tap-wise Mahalanobis distances at perturbed images, w_0 + sum_l w_l d_l(x_l); higher = more OOD.

    d_l is the squared ``Mahalanobis`` distance of tap l, and x_l = x - m sign(grad_x d_l(x)) a step that brings ID
    images nearer. The weights are those of a logistic regression of adversaries against clean images, the score its
    decision function: probabilities would saturate. Lee et al., "A Simple Unified Framework for Detecting
    Out-of-Distribution Samples and Adversarial Attacks", NeurIPS 2018.

    Calibration takes held-out ID images and their adversaries x + ``noise`` sign(grad_x cross-entropy): a random half
    for the regression, on standardised distances, the other half for the magnitude m that lets the fewest adversaries
    pass where 95% of the clean images do; among equals the first. It keeps 8 T M bytes of each image, for T taps and
    M magnitudes.

    Args:
        taps: the layers l.
        magnitudes: the candidates for m, in the unit of the images that the module reads.
        noise: length of the adversaries' step in each pixel, in the same unit. Adversaries stay in [0, 1] where the
            network normalises images itself; elsewhere their range is unknown.

    Attributes:
        coefficients: (T,) w_1 .. w_T.
        intercept: w_0.
        magnitude: m.
    """

    passes = 1
    coefficients: Tensor
    intercept: Tensor
    magnitude: Tensor

    def __init__(
        self,
        taps: Sequence[str],
        magnitudes: Sequence[float] = (0.0, 0.01, 0.005, 0.002, 0.0014, 0.001, 0.0005),
        noise: float = 0.05,
    ) -> None:
        super().__init__()
        if not taps or len(set(taps)) < len(taps):
            raise ValueError(f"the taps must be different, at least one, not {list(taps)}")
        if not magnitudes or min(magnitudes) < 0 or noise <= 0:
            raise ValueError(f"magnitudes are at least 0 and the noise is positive, not {list(magnitudes)} and {noise}")
        self.taps, self.magnitudes, self.noise = frozenset(taps), tuple(magnitudes), noise
        self.gaussians: Sequence[Mahalanobis] = nn.ModuleList(Mahalanobis(tap) for tap in taps)  # type: ignore[assignment]
        self.calibration_forwards = 1 + 2 * (1 + len(taps) * sum(m > 0 for m in magnitudes))
        self._sample, self._bounds = RowSample(), (-math.inf, math.inf)
        for name in ("coefficients", "intercept", "magnitude"):
            self.register_buffer(name, torch.empty(0))

    @property
    def forwards(self) -> int:  # type: ignore[override]
        """One for the gradients, and unless the chosen step has no length, one for each tap."""
        return 1 + len(self.gaussians) * bool(self.magnitude.any())

    def bind(self, backbone: Backbone | None) -> None:
        """See whether the images lie in [0, 1]."""
        normalizes = backbone is not None and backbone.mean is not None
        self._bounds = (0.0, 1.0) if normalizes else (-math.inf, math.inf)

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Take in a batch for the Gaussians of all taps."""
        for gaussians in self.gaussians:
            gaussians.update(evidence, labels)

    def calibrate(self, module: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Take in the distances of held-out images and of their adversaries."""
        with torch.inference_mode(False), torch.enable_grad():
            watched = self.watch(module, images)
            loss = F.cross_entropy(widen(module(watched).logits), labels.clone(), reduction="sum")
            (gradient,) = self.gradients(loss[None], watched)
        adversaries = (images + self.noise * gradient.sign()).clamp(*self._bounds)
        both = [self._distances(module, x, self.magnitudes) for x in (images, adversaries)]
        self._sample.update(torch.stack(both, 1))

    def _finalize(self) -> None:
        if int(self.finished):
            self._combine()
        else:
            for gaussians in self.gaussians:
                gaussians.finalize()

    def _combine(self) -> None:
        """Choose the magnitude and store its regression."""
        if self._sample.seen < 4:
            raise ValueError(
                f"it takes at least 4 held-out images to choose the weights and the magnitude, not {self._sample.seen}"
            )
        distances = self._sample.reduce().double().cpu().numpy()  # (n, clean or adversary, T, M)
        half, least = len(distances) // 2, math.inf
        for index, magnitude in enumerate(self.magnitudes):
            coefficients, intercept = regression(distances[:half, 0, :, index], distances[:half, 1, :, index])
            clean, adversaries = distances[half:, :, :, index].swapaxes(0, 1) @ coefficients
            passing = float((adversaries <= np.quantile(clean, 0.95, method="inverted_cdf")).mean())
            if passing < least:
                least = passing
                self.coefficients = torch.from_numpy(coefficients).to(self.coefficients)
                self.intercept, self.magnitude = self.coefficients.new_tensor((intercept, magnitude))
        self._sample = RowSample()

    def _distances(self, module: nn.Module, images: Tensor, magnitudes: Sequence[float]) -> Tensor:
        """Distance of each image to each tap's nearest class at each magnitude: (B, T, M)."""
        with torch.inference_mode(False), torch.enable_grad():
            watched = self.watch(module, images)
            evidence = module(watched)
            unmoved = torch.stack([gaussians(evidence) for gaussians in self.gaussians], 1)
            directions = (
                [gradient.sign() for gradient in self.gradients(unmoved.sum(0), watched)] if any(magnitudes) else []
            )
        columns = []
        with torch.no_grad():
            for magnitude in magnitudes:
                if not magnitude:
                    columns.append(unmoved.detach())
                    continue
                moved = [module(images - magnitude * direction) for direction in directions]
                pairs = zip(self.gaussians, moved, strict=True)
                columns.append(torch.stack([gaussians(evidence) for gaussians, evidence in pairs], 1))
        return torch.stack(columns, 2)

    def forward(self, module: nn.Module, images: Tensor) -> Tensor:
        """Score (B, C, H, W) images; leaves no gradient behind and no mode changed."""
        return self._distances(module, images, [float(self.magnitude)])[:, :, 0] @ self.coefficients + self.intercept


def regression(clean: NDArray[np.float64], adversaries: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Coefficients (T,) and intercept that separate (n, T) clean distances from those of adversaries.

    L2-regularised on standardised distances (C = 1) and translated back to distances as they are.
    """
    rows = np.concatenate([clean, adversaries])
    standardize, logistic = StandardScaler(), LogisticRegression(max_iter=1000)
    make_pipeline(standardize, logistic).fit(rows, np.repeat([0, 1], len(clean)))
    coefficients = logistic.coef_[0] / standardize.scale_
    return coefficients, float(logistic.intercept_[0] - coefficients @ standardize.mean_)
