"""Mahalanobis scoring over its two bare matrix products.

The limit whitens (B, D)(D, D) and projects on the class means (D, C), into memory that is there already.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.features import evidence, fit, gaussians, print_fit_memory, queries, two_products
from benchmarks.measure import COLUMNS, has_peer, interleave, print_table, timing_rows
from lightning_modules.scores.gaussian import Mahalanobis


def run(quick: bool) -> None:
    """Compare values, measure, print."""
    classes, width, per_class = (5, 16, 40) if quick else (100, 512, 1000)
    drawn = gaussians(classes, width, per_class)
    ours = fit(Mahalanobis(), drawn.batches(), classes)
    if has_peer():
        from pytorch_ood import detector

        peer = detector.Mahalanobis(None).fit_features(*map(torch.cat, zip(*drawn.batches(), strict=True)))
    print(f"  C={classes} classes, D={width} features, float32, fitted on {classes * per_class} rows")
    rows = []
    for number in (20,) if quick else (200, 1000):
        features = queries(drawn, number)
        scores = ours(evidence(features, classes))
        torch.testing.assert_close(scores, reference(drawn.covariance, drawn.centroids, features), rtol=1e-4, atol=0)
        contenders = {
            "limit": two_products(features, classes),
            "ours": partial(ours, evidence(features, classes)),
        }
        if has_peer():
            # its scatter is not divided by the number of rows, and its score is half the squared distance
            torch.testing.assert_close(
                scores, 2 * classes * per_class * peer.predict_features(features), rtol=1e-3, atol=0
            )
            contenders["pytorch-ood"] = partial(peer.predict_features, features)
        seconds = interleave(contenders, repetitions=2 if quick else 15)
        rows += timing_rows(f"B={number}", seconds, 1.3, {"pytorch-ood": 50}, judge=not quick)
    print("  same values: ours, a float64 reference" + (", pytorch-ood" if has_peer() else ""))
    print_table(COLUMNS, rows)
    print_fit_memory(Mahalanobis, "Mahalanobis", (classes, width), (8, 16) if quick else (100, 400))


def reference(covariance: Tensor, centroids: Tensor, features: Tensor) -> Tensor:
    """Squared distance (B,) to the nearest centroid, from the differences, in float64."""
    precision = covariance.inverse()
    offsets = features.double()[:, None] - centroids
    return torch.stack([((o @ precision) * o).sum(1).amin() for o in offsets]).float()
