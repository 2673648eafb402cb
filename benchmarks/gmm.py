"""GMM-energy scoring over its bare whitening product.

The limit is (B, D)(D, D) alone, into memory that is there already; the classes and the log-sum come on top. Ours and
scikit-learn's tied mixture share one covariance. pytorch-ood fits one for each class: the training features are such
that all of these are the same, so the three scores are, too.
"""

from functools import partial

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from benchmarks.features import Gaussians, evidence, fit, gaussians, print_fit_memory, queries
from benchmarks.measure import COLUMNS, has_peer, interleave, print_table, timing_rows
from lightning_modules.scores.gaussian import GMMEnergy


def run(quick: bool) -> None:
    """Compare values, measure, print."""
    classes, width, per_class = (5, 16, 40) if quick else (100, 512, 1000)
    drawn = gaussians(classes, width, per_class)
    ours = fit(GMMEnergy(normalize=False), drawn.batches(), classes)
    tied = tied_mixture(drawn)
    if has_peer():
        from pytorch_ood import detector

        peer = detector.GMM(None).fit_features(*map(torch.cat, zip(*drawn.batches(), strict=True)))
    print(
        f"  C={classes} components, D={width} features, float32 (peers: float64), {classes * per_class} training rows"
    )
    rows = []
    for number in (20,) if quick else (200, 1000):
        features = queries(drawn, number)
        scores = ours(evidence(features, classes)).double()
        double = features.double().numpy()
        np.testing.assert_allclose(scores, -tied.score_samples(double), rtol=1e-5)
        contenders = {
            "limit": partial(torch.mm, features, torch.eye(width), out=torch.empty(number, width)),
            "ours": partial(ours, evidence(features, classes)),
        }
        if has_peer():
            torch.testing.assert_close(scores, peer.predict_features(features), rtol=1e-4, atol=0)
            contenders["pytorch-ood"] = partial(peer.predict_features, features)
        contenders["scikit-learn"] = partial(tied.score_samples, double)
        seconds = interleave(contenders, repetitions=2 if quick else 9)
        targets = {"pytorch-ood": None, "scikit-learn": None}
        rows += timing_rows(f"B={number}", seconds, 1.5, targets, judge=not quick)
    print("  same values: ours, scikit-learn" + (", pytorch-ood" if has_peer() else ""))
    print_table(COLUMNS, rows)
    print_fit_memory(GMMEnergy, "GMM", (classes, width), (8, 16) if quick else (100, 400))


def tied_mixture(drawn: Gaussians) -> GaussianMixture:
    """Give scikit-learn's mixture the parameters that a fit of labelled data ends with."""
    mixture = GaussianMixture(len(drawn.means), covariance_type="tied")
    mixture.weights_ = np.full(len(drawn.means), 1 / len(drawn.means))
    mixture.means_, mixture.covariances_ = drawn.centroids.numpy(), drawn.covariance.numpy()
    mixture.precisions_cholesky_ = np.linalg.inv(np.linalg.cholesky(mixture.covariances_)).T
    return mixture
