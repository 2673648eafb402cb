"""Mahalanobis and relative Mahalanobis scoring over their two bare matrix products.

The limit whitens (B, D)(D, R) and projects on the class means (R, C), into memory that is there already. R = D, but
R = C - 1 for the relative distance: it differs between classes only where their means do, and the rest cancels.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.features import Gaussians, evidence, fit, gaussians, print_fit_memory, queries, two_products
from benchmarks.measure import COLUMNS, has_peer, interleave, print_table, timing_rows
from lightning_modules.scores.gaussian import Mahalanobis
from lightning_modules.scores.relative_mahalanobis import RelativeMahalanobis


def run(quick: bool) -> None:
    """Compare values, measure, print."""
    classes, width, per_class = (5, 16, 40) if quick else (100, 512, 1000)
    drawn = gaussians(classes, width, per_class)
    number = classes * per_class
    # pytorch-ood does not divide its scatter by the number of rows, and halves the first of the two
    scores = {
        "nearest": (Mahalanobis(), "Mahalanobis", 2 * number, width),
        "relative": (RelativeMahalanobis(), "RMD", number, classes - 1),
    }
    print(f"  C={classes} classes, D={width} features, float32, fitted on {number} rows")
    rows = []
    for name, (ours, theirs, factor, directions) in scores.items():
        fit(ours, drawn.batches(), classes)
        if has_peer():
            from pytorch_ood import detector

            peer = getattr(detector, theirs)(None).fit_features(*map(torch.cat, zip(*drawn.batches(), strict=True)))
        for size in (20,) if quick else (200, 1000):
            features = queries(drawn, size)
            found = ours(evidence(features, classes))
            expected = reference(drawn, features, name == "relative")
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # a difference may be next to 0
            contenders = {
                "limit": two_products(features, classes, directions),
                "ours": partial(ours, evidence(features, classes)),
            }
            if has_peer():
                torch.testing.assert_close(found, factor * peer.predict_features(features), rtol=1e-3, atol=1e-3)
                contenders["pytorch-ood"] = partial(peer.predict_features, features)
            seconds = interleave(contenders, repetitions=2 if quick else 15)
            rows += timing_rows(f"{name}, B={size}", seconds, 1.3, {"pytorch-ood": 50}, judge=not quick)
    print("  same values: ours, a float64 reference" + (", pytorch-ood" if has_peer() else ""))
    print_table(COLUMNS, rows)
    print_fit_memory(Mahalanobis, "Mahalanobis", (classes, width), (8, 16) if quick else (100, 400))


def reference(drawn: Gaussians, features: Tensor, relative: bool) -> Tensor:
    """Squared distance (B,) to the nearest class, if ``relative`` less that to all classes as one, in float64."""
    means, covariance = drawn.centroids, drawn.covariance
    nearest = squared(covariance, means, features).amin(1)
    if relative:
        nearest -= squared(covariance + torch.cov(means.T, correction=0), means.mean(0, keepdim=True), features)[:, 0]
    return nearest.float()


def squared(covariance: Tensor, means: Tensor, features: Tensor) -> Tensor:
    """Squared Mahalanobis distances (B, C) in float64, from the differences."""
    precision = covariance.inverse()
    offsets = features.double()[:, None] - means
    return torch.stack([((o @ precision) * o).sum(1) for o in offsets])
