"""GMM-energy fitting over its bare covariance product, and scoring over its bare whitening product.

The limit of the fit is (D, N)(N, D) alone in float64, that of scoring (B, D)(D, D) alone, into memory that is there
already; means and factorisation, or the classes and the log-sum, come on top. Ours and scikit-learn's models share one
covariance. Its mixtures know no labels: a linear discriminant analysis fits, a tied mixture of what it found scores.
pytorch-ood has one covariance for each class: the training features are such that all of these are the same, so the
three scores are, too. Ours is fitted in a stream of batches, the peers on all rows at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.mixture import GaussianMixture

from benchmarks.features import Gaussians, evidence, fit, gaussians, print_fit_memory, queries
from benchmarks.measure import COLUMNS, has_peer, interleave, print_table, timing_rows
from lightning_modules.scores.gmm import GMMEnergy

NO_TARGETS = {"pytorch-ood": None, "scikit-learn": None}


def run(quick: bool) -> None:
    """Compare values, measure, print."""
    classes, width, per_class = (5, 16, 40) if quick else (100, 512, 1000)
    number = classes * per_class
    drawn = gaussians(classes, width, per_class)
    fits = contenders_of_fit(drawn)
    models = {name: call() for name, call in fits.items() if name != "limit"}
    ours, tied = models["ours"], tied_mixture(models["scikit-learn"])
    print(f"  C={classes} components, D={width} features, float32 (peers: float64), {number} training rows")
    rows = []
    for size in (20,) if quick else (200, 1000):
        features = queries(drawn, size)
        scores = ours(evidence(features, classes)).double()
        double = features.double().numpy()
        np.testing.assert_allclose(scores, -tied.score_samples(double), rtol=1e-5)
        contenders = {
            "limit": partial(torch.mm, features, torch.eye(width), out=torch.empty(size, width)),
            "ours": partial(ours, evidence(features, classes)),
        }
        if has_peer():
            peer = models["pytorch-ood"]
            torch.testing.assert_close(scores, peer.predict_features(features), rtol=1e-4, atol=0)
            contenders["pytorch-ood"] = partial(peer.predict_features, features)
        contenders["scikit-learn"] = partial(tied.score_samples, double)
        seconds = interleave(contenders, repetitions=2 if quick else 9)
        rows += timing_rows(f"score, B={size}", seconds, 1.5, NO_TARGETS, judge=not quick)
    seconds = interleave(fits, repetitions=2 if quick else 5)
    rows += timing_rows(f"fit, N={number}", seconds, 1.5, NO_TARGETS, judge=not quick)
    print("  same values: scores of ours, scikit-learn" + (", pytorch-ood" if has_peer() else ""))
    print_table(COLUMNS, rows)
    print_fit_memory(GMMEnergy, "GMM", (classes, width), (8, 16) if quick else (100, 400))


def contenders_of_fit(drawn: Gaussians) -> dict[str, Callable[[], Any]]:
    """Make calls that fit each side and return what was fitted; of the limit, the product."""
    batches = list(drawn.batches())
    features, labels = map(torch.cat, zip(*batches, strict=True))
    double, (classes, width) = features.double(), drawn.means.shape
    lda = LinearDiscriminantAnalysis(solver="lsqr", store_covariance=True)
    contenders: dict[str, Callable[[], Any]] = {
        "limit": partial(torch.mm, double.T, double, out=double.new_empty(width, width)),
        "ours": lambda: fit(GMMEnergy(normalize=False), batches, classes),
        "scikit-learn": partial(lda.fit, double.numpy(), labels.numpy()),
    }
    if has_peer():
        from pytorch_ood import detector

        contenders["pytorch-ood"] = lambda: detector.GMM(None).fit_features(features, labels)
    return contenders


def tied_mixture(found: LinearDiscriminantAnalysis) -> GaussianMixture:
    """Make the mixture whose components are the classes that scikit-learn has fitted."""
    mixture = GaussianMixture(len(found.priors_), covariance_type="tied")
    mixture.weights_, mixture.means_, mixture.covariances_ = found.priors_, found.means_, found.covariance_
    mixture.precisions_cholesky_ = np.linalg.inv(np.linalg.cholesky(mixture.covariances_)).T
    return mixture
