"""Features with known structure, for the benchmarks that score features without a network."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import has_peer, mebibytes, peak_growth, print_table
from lightning_modules.evidence import Evidence
from lightning_modules.scores.score import Score

STREAMED = 200  # rows of a batch while fitting


class Gaussians(NamedTuple):
    """Training features whose classes have the same covariance exactly, so that shared and per-class fits agree.

    Attributes:
        means: (C, D).
        residuals: (M, D), the same in each class.
    """

    means: Tensor
    residuals: Tensor

    @property
    def covariance(self) -> Tensor:
        """The biased (D, D) covariance of each class, and of all pooled, in float64."""
        residuals = self.residuals.double()
        residuals = residuals - residuals.mean(0)
        return residuals.T @ residuals / len(residuals)

    @property
    def centroids(self) -> Tensor:
        """The (C, D) sample means of the classes in float64."""
        return self.means.double() + self.residuals.double().mean(0)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (features, labels), each row mixing all classes as training batches do."""
        for rows in self.residuals.split(max(1, STREAMED // len(self.means))):
            features = (rows[:, None] + self.means).flatten(0, 1)
            yield features, torch.arange(len(self.means)).repeat(len(rows))


def gaussians(classes: int, width: int, per_class: int) -> Gaussians:
    """Draw C class means and M residuals in D dimensions; with M well above D the float32 of peers copes."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(classes, width, generator=generator)
    return Gaussians(means, torch.randn(per_class, width, generator=generator) * torch.linspace(0.5, 1.5, width))


def queries(drawn: Gaussians, number: int) -> Tensor:
    """Draw (B, D) test features: half near the classes, half far."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(number, drawn.means.shape[1], generator=generator)
    return (
        drawn.means[torch.arange(number) % len(drawn.means)]
        + noise * torch.tensor([1.0, 3.0]).repeat(number)[:number, None]
    )


def evidence(features: Tensor, classes: int) -> Evidence:
    """Wrap features (B, D) as the evidence of a network of so many classes."""
    return Evidence(features.new_zeros(len(features), classes), {"penultimate": features}, {}, None)


def two_products(features: Tensor, classes: int, directions: int) -> Callable[[], Tensor]:
    """Return a call that whitens in so many directions and projects on the classes, bare, for a shared covariance."""
    whitening, centroids = torch.eye(features.shape[1], directions), torch.ones(classes, directions)
    points, distances = features.new_empty(len(features), directions), torch.empty(len(features), classes)
    return lambda: torch.mm(torch.mm(features, whitening, out=points), centroids.T, out=distances)


def fit(score: Score, batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> Score:
    """Stream batches of (features, labels) into one of our scores."""
    for features, labels in batches:
        score.update(evidence(features, classes), labels)
    score.finalize()
    return score


def print_fit_memory(
    make_ours: Callable[[], Score], peer: str, shape: tuple[int, int], per_class: Sequence[int]
) -> None:
    """Stream rows into fits of both sides and print by how much memory rose.

    Args:
        make_ours: makes our score.
        peer: name of its detector.
        shape: (C, D).
        per_class: how many rows of each class, one number for each line.
    """
    classes, width = shape
    rows = []
    for rows_per_class in (per_class[0], *per_class):  # the first goes before, to warm up
        score = make_ours()

        def batches(number: int = rows_per_class) -> Iterator[tuple[Tensor, Tensor]]:
            generator = torch.Generator().manual_seed(0)
            for _ in range(number):
                yield torch.randn(classes, width, generator=generator), torch.arange(classes)

        ours = mebibytes(peak_growth(partial(fit, score, batches(), classes)))
        theirs = "not installed"
        if has_peer():
            detector = getattr(import_module("pytorch_ood.detector"), peer)(lambda features: features).to("cpu")
            theirs = mebibytes(peak_growth(partial(detector.fit, batches())))
        state = sum(buffer.nbytes for buffer in score.buffers())
        rows.append((f"N={classes * rows_per_class}", ours, mebibytes(state), theirs))
    print("  memory of the fit, rows streamed to both sides: ours is flat in N")
    print_table(("case", "ours, peak", "ours, kept", "pytorch-ood, peak"), rows[1:])
